"""Captured steps of one way, at one batch and context, and what they read."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microglia.anatomy import Anatomy
from microglia.benchmark.costs import weight_bytes
from microglia.benchmark.latency import Clock
from microglia.benchmark.pattern import random_keep
from microglia.execution import Captured, Decision, Masked, Request
from microglia.units import HeadSite, Site, find_sites
from microglia.units.step import layer_kv_bytes


class Ours:
    """One way (see `way_options`) with its prompts read.

    units: kinds of what is decided about. Raises ConfigError where captured steps cannot prune them.
    """

    def __init__(self, lm: Any, ids: Tensor, way: str, units: Sequence[str], steps: int) -> None:
        self.lm, self.steps, self.clock = lm, steps, Clock(ids.device)
        self.batch, self.context = ids.shape
        self.ids, self.mask = ids, torch.ones_like(ids)
        self.sites = find_sites(lm, units)
        self.execution = Captured(lm, **way_options(way))
        self.execution.check_sites(self.sites)
        began = time.monotonic()
        self.execution.step_for(self.batch, self.context + steps + 2)
        self.first_s = time.monotonic() - began  # of capturing the dense step
        with self.execution.serving(Request(self.mask, steps + 2)) as self.step:
            lm(ids, past_key_values=self.step.cache, logits_to_keep=1)

    def capture(self, keep: Sequence[Tensor] | None) -> float:
        """Seconds until a decision can be replayed: what no decision before it had captured."""
        began = time.monotonic()
        self.burst(keep)
        return time.monotonic() - began

    def burst(self, keep: Sequence[Tensor] | None) -> tuple[float, float]:
        """Milliseconds of a step, and of the switch before it; None keeps everything.

        The same prompt is switched again and again, so its keys end up in wrong places: the times do not know.
        """
        decision = self._decision(keep)
        self.step.clear()
        self.step.prompt_read(self.mask)
        switch = self.clock(lambda: self._decide(decision))
        self.step.step()

        def steps() -> None:
            for _ in range(self.steps):
                self.step.step()

        return self.clock(steps) / self.steps, switch

    def apart(self, keep: Sequence[Tensor] | None) -> float:
        """How far a step's logits lie from those of masked execution, which is right: ‖ours - masked‖ ÷ ‖masked‖.

        Reads the prompts again, twice, the second time into another cache.
        """
        decision, token = self._decision(keep), self.ids[:, -1:]
        with self.execution.serving(Request(self.mask, self.steps + 2)) as step:
            self.lm(self.ids, past_key_values=step.cache, logits_to_keep=1)
            with self.execution.apply(self.sites, decision, step.cache):
                ours = self.lm(token, past_key_values=step.cache).logits[:, -1].float()
        cache = self.lm(self.ids, use_cache=True, logits_to_keep=1).past_key_values
        with Masked().apply(self.sites, decision, cache):
            masked = self.lm(token, past_key_values=cache).logits[:, -1].float()
        return float((ours - masked).norm() / masked.norm())

    def _decision(self, keep: Sequence[Tensor] | None) -> Decision:
        every = [torch.ones(1, site.geometry.count, device=self.mask.device) for site in self.sites]
        return Decision(every if keep is None else keep)

    def _decide(self, decision: Decision) -> None:
        with self.execution.apply(self.sites, decision, self.step.cache):
            pass  # the step keeps what it was given until the next decision

    def tried(self) -> dict[str, float]:
        """Milliseconds of a step's layers by the ways of attention that were tried for the present decision's levels.

        The fastest first; with one way alone nothing was timed, and it has 0.
        """
        spent = Counter[str]()
        for level in dict.fromkeys(variant.level for variant in self.step.variants):
            spent.update({way: 1e3 * seconds for way, seconds in self.step.ways[level].items()})
        return dict(sorted(spent.items(), key=lambda item: item[1]))

    def keep(self, ratio: float, *, rows: int = 1) -> list[Tensor]:
        """Random keeps (rows, U) of every site with this share of its units, in every row and layer the same."""
        return [k.to(self.mask.device) for k in random_units(self.sites, ratio, rows=rows)]

    def bytes(self, keep: Sequence[Tensor] | None, *, shared: bool = True) -> int:
        """What a step reads: weights, which rows with decisions of their own do not save, and keys and values."""
        kv = layer_kv_bytes(Anatomy(self.lm), self.batch, self.context)
        if keep is None:
            return weight_bytes(self.lm, rows=self.batch) + sum(kv)
        for site, k in zip(self.sites, keep, strict=True):
            kv[site.layer.index] = round(kv[site.layer.index] * site.kv_share(k))
        cut = (self.sites, keep) if shared else ()
        return weight_bytes(self.lm, *cut, rows=self.batch) + sum(kv)


def way_options(way: str) -> dict[str, Any]:
    """What Captured is given for compile:attention:block, or for compile:attention:block:linear."""
    compiled, attention, block, *linear = way.split(":")
    given = {"compiled": compiled != "none" and compiled, "attention": attention, "block": int(block)}
    return given | ({"linear": linear[0]} if linear else {})


def of_one_row(way: str) -> bool:
    """Whether a way makes products as only a single row can have them."""
    return "linear" in way_options(way)


def random_units(sites: Sequence[Site], ratio: float, *, rows: int = 1) -> list[Tensor]:
    """Random keeps (rows, U) of every site: heads as `random_keep` has them, others in number."""
    heads = [site.geometry for site in sites if isinstance(site, HeadSite)]
    of_heads = iter(random_keep(heads, ratio, rows=rows))
    generator = torch.Generator().manual_seed(0)

    def others(count: int) -> Tensor:
        places = torch.rand(rows, count, generator=generator).argsort(-1)
        return (places < max(1, round(ratio * count))).float()

    return [next(of_heads) if isinstance(site, HeadSite) else others(site.geometry.count) for site in sites]
