"""One batch of prompts on one model: whole requests, prefills and bursts of decode steps, with any execution."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from microglia.anatomy import input_device
from microglia.attach import attached
from microglia.benchmark.latency import Clock
from microglia.benchmark.memory import peak_bytes, reset_peak
from microglia.benchmark.subjects import Prompted
from microglia.execution import Decision, Execution, Request
from microglia.units import Site
from microglia.units.kv import kv_bytes

BURST = 4  # timed decode steps in a row; one untimed before them brings the variant's own weights and code back


@dataclass(frozen=True)
class RequestTimes:
    """Times of one request, and the most memory held in it."""

    first_token_ms: float
    total_ms: float
    peak: int | None


@dataclass(frozen=True)
class Burst:
    """Mean time of the steps of one burst, what preparing them took, and the bytes that their cache began with."""

    step_ms: float
    decision_ms: float
    slicing_ms: float
    kv: int


class Decided(Execution):
    """Prunes nothing: what is left of `attached` is monitoring and decision. Keeps the last decision and its cache."""

    name: ClassVar[str] = "decided"
    decision: Decision
    cache: Any

    @contextmanager
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None) -> Iterator[None]:
        self.decision, self.cache = decision, cache
        yield


class Case:
    """One batch of prompts on one model with the pruner for it."""

    def __init__(self, lm: Any, prompted: Prompted, new_tokens: int) -> None:
        self.lm, self.pruner, self.new_tokens = lm, prompted.pruner, new_tokens
        self.ids = prompted.ids.to(input_device(lm))
        self.pruner.policy.to(self.ids.device)
        self.sites = self.pruner.sites(lm)
        self.clock = Clock(self.ids.device)
        self.next = self.ids[:, -1:].contiguous()

    def _read(self, cache: Cache | None = None) -> Any:
        return self.lm(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _request(self, new_tokens: int) -> Request:
        return Request(torch.ones_like(self.ids), new_tokens, fill=self.pruner.fill == "mean")

    # --- whole requests, before this case holds any cache of its own: they show the peak of memory

    def request(self, execution: Execution) -> RequestTimes:
        """Prompt and answer, greedy."""
        reset_peak(self.clock.device)
        pruned = attached(self.lm, self.pruner, execution) if execution.prunes else nullcontext()
        with pruned, execution.prepared(self._request(self.new_tokens)) as prepared:
            out: list[Any] = []
            first = self.clock(lambda: out.append(self._read(prepared.cache)))
            greedy = prepared.greedy
            answer = partial(self._answer, out.pop()) if greedy is None else partial(greedy, out.pop().logits[:, -1])
            rest = self.clock(answer)
        return RequestTimes(first, first + rest, peak_bytes(self.clock.device))

    def _answer(self, out: Any) -> None:
        cache = out.past_key_values
        for _ in range(self.new_tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self.lm(token, past_key_values=cache, use_cache=True)

    def prefill(self) -> float:
        """Milliseconds of a dense prefill."""
        return self.clock(self._read)

    def monitored_prefill(self) -> float:
        """Milliseconds of a prefill with monitoring and decision."""
        with attached(self.lm, self.pruner, "dense"):
            return self.clock(self._read)

    # --- decode steps, all variants from the same cache

    def decided(self) -> tuple[list[Tensor], Decision, Any]:
        """The features of the prompts, the decision on them and their dense cache."""
        execution = Decided()
        with attached(self.lm, self.pruner, execution) as trace:
            self._read()
        return trace.features, execution.decision, execution.cache

    def burst(self, execution: Execution, features: Sequence[Tensor], decision: Decision, cache: Any) -> Burst:
        """Decide and prune anew, as for a new prompt, then decode."""
        with ExitStack() as stack:
            prepared = stack.enter_context(execution.prepared(self._request(BURST + 1)))
            prompt = shared_copy(cache) if prepared.cache is None else self._read(prepared.cache).past_key_values
            deciding = self.clock(lambda: self._decide(features))
            pruning = execution.apply(self.sites, decision, prompt)
            slicing = self.clock(lambda: stack.enter_context(pruning))
            kv = kv_bytes(prompt)
            return Burst(self._steps(prompt), deciding, slicing, kv)

    def _decide(self, features: Sequence[Tensor]) -> list[Tensor]:
        return self.pruner.keep(self.pruner.policy(list(features)), [site.geometry for site in self.sites])

    def _steps(self, cache: Any) -> float:
        """Milliseconds of one decode step, mean of a burst; the cache grows."""

        def steps(count: int) -> None:
            for _ in range(count):
                self.lm(self.next, past_key_values=cache, use_cache=True)

        steps(1)
        return self.clock(lambda: steps(BURST)) / BURST


def shared_copy(cache: Any) -> Any:
    """The same cache once more, sharing its tensors: dynamic layers replace them when they grow."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
