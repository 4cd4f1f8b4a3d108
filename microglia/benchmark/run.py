"""One benchmark: for every batch size, context and keep ratio, four variants taking turns on one model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from microglia.attach import gated
from microglia.benchmark.case import Burst, Case, Request
from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.flops import prefill_flops, step_flops
from microglia.benchmark.latency import Ratio, Summary, interleaved, paired_ratio, summary
from microglia.benchmark.memory import kept_kv_bytes, kept_weight_bytes, weight_bytes
from microglia.benchmark.pattern import is_shared
from microglia.benchmark.subjects import Subject
from microglia.cache import kv_bytes
from microglia.compact import compacted
from microglia.errors import ConfigError
from microglia.gate import keep_ratio
from microglia.record import circumstances
from microglia.results import BenchmarkResult, BenchmarkRow, Circumstances
from microglia.sites import causal_lm

VARIANTS = ("dense", "masked", "compact", "compact_total")


@dataclass(frozen=True)
class Plan:
    """What to measure: every combination of batch size, context and keep ratio.

    new_tokens: length of an answer, for whole requests and for spreading decision and slicing over its tokens.
    num_runs: repetitions of the decode steps; prefills are repeated a fifth as often, whole requests a tenth.
    """

    batch_sizes: Sequence[int] = (1,)
    contexts: Sequence[int] = (128, 1024)
    keep_ratios: Sequence[float | None] = (0.75,)
    new_tokens: int = 64
    num_runs: int = 20

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts", "keep_ratios"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one value")
        for name in ("batch_sizes", "contexts"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={list(getattr(self, name))} was given; every value must be at least 1")
        if self.new_tokens < 2 or self.num_runs < 1:
            raise ConfigError(
                f"new_tokens={self.new_tokens} and num_runs={self.num_runs} were given; give at least 2 and at least 1"
            )


@torch.inference_mode()
def benchmark(
    model: Any,
    subject: Subject,
    plan: Plan,
    about: dict[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchmarkResult:
    """Measure the plan on a model in memory; it comes back unchanged. `about` goes into the report.

    progress: called with a name, the number of combinations done and their number.
    """
    lm: Any = causal_lm(model)
    rows = []
    cases = list(product(plan.keep_ratios, plan.batch_sizes, plan.contexts))
    for done, (ratio, batch, context) in enumerate(cases):
        if progress is not None:
            progress("decode steps", done, len(cases))
        rows += _measure(Case(lm, subject(batch, context, ratio), plan.new_tokens), plan)
    made = Circumstances(**circumstances(lm.device))
    return BenchmarkResult(rows=tuple(rows), subject=about, circumstances=made)


@dataclass(frozen=True)
class _Measured:
    """The raw measurements of one case."""

    requests: dict[str, list[Request]]
    bursts: dict[str, list[Burst]]
    monitoring: Ratio
    new_tokens: int

    @staticmethod
    def path(variant: str) -> str:
        return "compact" if variant == "compact_total" else variant

    def _times(self, variant: str) -> list[float]:
        bursts = self.bursts[self.path(variant)]
        if variant != "compact_total":
            return [b.step_ms for b in bursts]
        return [b.step_ms + (b.decision_ms + b.slicing_ms) / self.new_tokens for b in bursts]

    def time(self, variant: str) -> tuple[Summary, Ratio]:
        times = self._times(variant)
        return summary(times), paired_ratio(self._times("dense"), times)

    def median(self, name: str) -> float:
        return summary([getattr(burst, name) for burst in self.bursts["compact"]]).median

    def break_even(self) -> int | None:
        dense, ratio = self.time("dense")[0].median, self.time("compact")[1].median
        return break_even_tokens(self.median("decision_ms") + self.median("slicing_ms"), dense, dense / ratio)

    def request(self, variant: str) -> tuple[float, float, float]:
        """Time to the first token, of the whole request, and dense request ÷ this request."""
        own = self.requests[self.path(variant)]
        total = [r.total_ms for r in own]
        ratio = paired_ratio([r.total_ms for r in self.requests["dense"]], total)
        return summary([r.first_token_ms for r in own]).median, summary(total).median, ratio.median

    def peak(self, variant: str) -> int | None:
        return max((r.peak for r in self.requests[self.path(variant)] if r.peak is not None), default=None)


def _measure(case: Case, plan: Plan) -> list[BenchmarkRow]:
    """One row per variant."""
    requests = interleaved(
        {
            "dense": lambda: case.request(None),
            "masked": lambda: case.request(gated),
            "compact": lambda: case.request(compacted),
        },
        max(1, plan.num_runs // 10),
    )
    prefills = interleaved({"dense": case.prefill, "monitored": case.monitored_prefill}, max(3, plan.num_runs // 5))
    cache, features, keep = case.decided()
    bursts = interleaved(
        {
            "dense": lambda: case.dense_burst(cache),
            "masked": lambda: case.masked_burst(cache, keep),
            "compact": lambda: case.compact_burst(cache, features),
        },
        plan.num_runs,
    )
    measured = _Measured(requests, bursts, paired_ratio(prefills["monitored"], prefills["dense"]), plan.new_tokens)
    dense, compact = _costs(case, cache, None), _costs(case, cache, keep)
    return [_row(variant, case, measured, dense, compact, keep) for variant in VARIANTS]


@dataclass(frozen=True)
class _Costs:
    """What a decode step reads and computes, and a prefill computes, by counting."""

    weight_bytes: int
    kv_bytes: int
    prefill_flops: int
    step_flops: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def _costs(case: Case, cache: Any, keep: list[Tensor] | None) -> _Costs:
    (batch, context), lm, sites = case.ids.shape, case.lm, case.sites
    windows = [getattr(cache.layers[site.layer], "sliding_window", None) for site in sites]
    keys = [min(context + 1, window or context + 1) for window in windows]
    return _Costs(
        weight_bytes(lm, rows=batch) if keep is None else kept_weight_bytes(lm, sites, keep, rows=batch),
        kv_bytes(cache) if keep is None else kept_kv_bytes(cache, sites, keep),
        prefill_flops(lm, sites, batch=batch, context=context, windows=windows),
        step_flops(lm, sites, batch=batch, keys=keys, keep=keep),
    )


def _row(
    variant: str, case: Case, measured: _Measured, dense: _Costs, compact: _Costs, keep: list[Tensor]
) -> BenchmarkRow:
    batch, context = case.ids.shape
    time, ratio = measured.time(variant)
    pruned, is_compact = variant != "dense", variant.startswith("compact")
    costs = compact if is_compact else dense
    best = ceiling(dense.bytes, compact.bytes) if pruned else 1.0
    kept = float(keep_ratio(keep).mean()) if pruned else 1.0
    kv = measured.bursts[measured.path(variant)][0].kv
    first_token, request, request_ratio = measured.request(variant)
    return BenchmarkRow(
        variant=variant,
        batch_size=batch,
        context=context,
        keep_ratio=kept,
        ms_per_token=time.median,
        ratio_to_dense=ratio.median,
        ceiling=best,
        realised_share=realised_share(ratio.median, best),
        kv_bytes=kv,
        peak_bytes=measured.peak(variant),
        break_even_tokens=measured.break_even() if is_compact else None,
        p20=time.p20,
        p80=time.p80,
        n=time.n,
        ratio_ci95=ratio.ci95,
        sparsity=1 - kept,
        decides="together" if is_shared(keep) else "per row",
        weight_bytes=costs.weight_bytes,
        bytes_per_token=costs.weight_bytes + kv,
        prefill_flops=costs.prefill_flops,
        step_flops=costs.step_flops,
        first_token_ms=first_token,
        request_ms=request,
        request_ratio=request_ratio,
        new_tokens=measured.new_tokens,
        decision_ms=measured.median("decision_ms") if is_compact else None,
        slicing_ms=measured.median("slicing_ms") if is_compact else None,
        monitoring_ratio=measured.monitoring.median if pruned else None,
    )
