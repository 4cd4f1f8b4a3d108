"""One batch of prompts on one model: whole requests, prefills and bursts of decode steps."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from microglia.attach import attached, gated
from microglia.benchmark.latency import Clock
from microglia.benchmark.memory import peak_bytes, reset_peak
from microglia.benchmark.subjects import Prompted
from microglia.cache import kv_bytes
from microglia.compact import compacted
from microglia.sites import find_sites

BURST = 4  # timed decode steps in a row; one untimed before them brings the variant's own weights and code back


@dataclass(frozen=True)
class Request:
    """Times of one request, and the most memory held in it."""

    first_token_ms: float
    total_ms: float
    peak: int | None


@dataclass(frozen=True)
class Burst:
    """Mean time of the steps of one burst, what preparing them took, and the bytes that their cache began with."""

    step_ms: float
    decision_ms: float = 0.0
    slicing_ms: float = 0.0
    kv: int = 0


@contextmanager
def _untouched(*_: Any, **__: Any) -> Iterator[None]:
    """A pruning that prunes nothing: what is left of `attached` is monitoring and decision."""
    yield


class Case:
    """One batch of prompts on one model with the decisions for it."""

    def __init__(self, lm: Any, prompted: Prompted, new_tokens: int) -> None:
        self.lm, self.ids, self.new_tokens = lm, prompted.ids.to(lm.device), new_tokens
        self.policy, self.gate, self.look = prompted.policy.to(lm.device), prompted.gate, prompted.look
        self.sites = find_sites(lm)
        self.clock = Clock(lm.device)
        self.next = self.ids[:, -1:].contiguous()

    # --- whole requests, before this case holds any cache of its own: they show the peak of memory

    def request(self, pruning: Any) -> Request:
        """Prompt and answer, greedy; pruned as `pruning` does it, dense when None."""
        reset_peak(self.lm.device)
        with self._attached(pruning) if pruning else nullcontext():
            out: list[Any] = []
            first = self.clock(lambda: out.append(self._read()))
            rest = self.clock(lambda: self._answer(out.pop()))
        return Request(first, first + rest, peak_bytes(self.lm.device))

    def _attached(self, pruning: Any) -> AbstractContextManager[Any]:
        return attached(self.lm, self.policy, gate=self.gate, look=self.look, pruning=pruning)

    def _read(self) -> Any:
        return self.lm(self.ids, use_cache=True, logits_to_keep=1)

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
        with self._attached(_untouched):
            return self.clock(self._read)

    # --- decode steps, all variants from the same cache

    def decided(self) -> tuple[Any, list[Tensor], list[Tensor]]:
        """The prompt's dense cache, the features seen in it, and the keep decided on."""
        with self._attached(_untouched) as trace:
            cache = self._read().past_key_values
        return cache, trace.features, trace.keep

    def steps(self, cache: Any) -> float:
        """Milliseconds of one decode step, mean of a burst; the cache grows."""

        def step() -> None:
            self.lm(self.next, past_key_values=cache, use_cache=True)

        def burst() -> None:
            for _ in range(BURST):
                step()

        step()
        return self.clock(burst) / BURST

    def dense_burst(self, cache: Any) -> Burst:
        return Burst(self.steps(twin(cache)), kv=kv_bytes(cache))

    def masked_burst(self, cache: Any, keep: Sequence[Tensor]) -> Burst:
        with gated(self.sites, keep):
            return self.dense_burst(cache)

    def compact_burst(self, cache: Any, features: Sequence[Tensor]) -> Burst:
        """Decide and slice anew, as for a new prompt, then decode."""
        cache, keep = twin(cache), list[Tensor]()
        decision = self.clock(lambda: keep.extend(self._decide(features)))
        pruning = compacted(self.sites, keep, cache=cache)
        slicing = self.clock(pruning.__enter__)
        try:
            kv = kv_bytes(cache)
            return Burst(self.steps(cache), decision, slicing, kv)
        finally:
            pruning.__exit__(None, None, None)

    def _decide(self, features: Sequence[Tensor]) -> list[Tensor]:
        return self.gate.every(self.policy(list(features)), [site.geometry for site in self.sites])


def twin(cache: Any) -> Any:
    """The same cache once more, sharing its tensors: dynamic layers replace them when they grow."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
