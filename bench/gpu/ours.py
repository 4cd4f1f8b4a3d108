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
from microglia.benchmark.pattern import keep_ratio_for, random_keep
from microglia.execution import Captured, Decision, Masked, Request
from microglia.units import HeadSite, find_sites, step_costs
from microglia.units.step import layer_kv_bytes


class Ours:
    """One way (compile:attention:block) with its prompts read.

    units: kinds of what is decided about. Raises ConfigError where captured steps cannot prune them.
    """

    def __init__(self, lm: Any, ids: Tensor, way: str, units: Sequence[str], steps: int) -> None:
        self.lm, self.steps, self.clock = lm, steps, Clock(ids.device)
        self.batch, self.context = ids.shape
        self.ids, self.mask = ids, torch.ones_like(ids)
        self.sites = find_sites(lm, units)
        compiled, attention, block = way.split(":")
        self.execution = Captured(lm, compiled=compiled != "none" and compiled, attention=attention, block=int(block))
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
        """Random keeps (rows, U) of every site, in every row and layer as many.

        `ratio` is a share of the heads, or of all bytes that a step reads where other units can go too.
        """
        geometries = [site.geometry for site in self.sites]
        if not all(isinstance(site, HeadSite) for site in self.sites):
            costs = step_costs(self.lm, self.sites, batch=self.batch, context=self.context)
            ratio = keep_ratio_for(geometries, costs, ratio)
        return [k.to(self.mask.device) for k in random_keep(geometries, ratio, rows=rows)]

    def bytes(self, keep: Sequence[Tensor] | None, *, shared: bool = True) -> int:
        """What a step reads: weights, which rows with decisions of their own do not save, and keys and values."""
        kv = layer_kv_bytes(Anatomy(self.lm), self.batch, self.context)
        if keep is None:
            return weight_bytes(self.lm, rows=self.batch) + sum(kv)
        for site, k in zip(self.sites, keep, strict=True):
            kv[site.layer.index] = round(kv[site.layer.index] * site.kv_share(k))
        cut = (self.sites, keep) if shared else ()
        return weight_bytes(self.lm, *cut, rows=self.batch) + sum(kv)
