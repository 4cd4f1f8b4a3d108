"""One benchmark: for every batch size, context and keep ratio, executions taking turns on one model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from microglia.anatomy import causal_lm
from microglia.benchmark.case import Burst, Case, RequestTimes
from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.costs import Costs, costs
from microglia.benchmark.latency import interleaved, paired_ratio, summary
from microglia.benchmark.subjects import Subject
from microglia.errors import ConfigError
from microglia.execution import Decision, Execution, execution_for
from microglia.gate import keep_ratio, rows_agree
from microglia.record import circumstances
from microglia.results import BenchmarkResult, BenchmarkRow, Circumstances


@dataclass(frozen=True)
class Plan:
    """What to measure: every combination of batch size, context and budget: a keep ratio, or a share of the bytes.

    new_tokens: length of an answer, for whole requests and for spreading decision and slicing over its tokens.
    num_runs: repetitions of the decode steps; prefills are repeated a fifth as often, whole requests a tenth.
    executions: by name or as objects; one that saves something also gets a row `…_total`, with decision and slicing.
        What one keeps between requests, static caches say, counts in the peak memory of all.
    """

    batch_sizes: Sequence[int] = (1,)
    contexts: Sequence[int] = (128, 1024)
    keep_ratios: Sequence[float | None] = (0.75,)
    byte_shares: Sequence[float] = ()
    new_tokens: int = 64
    num_runs: int = 20
    executions: Sequence[str | Execution] = ("dense", "masked", "compact")

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts", "keep_ratios"):
            if not getattr(self, name) and not (name == "keep_ratios" and self.byte_shares):
                raise ConfigError(f"{name} is empty; give at least one value")
        for name in ("batch_sizes", "contexts"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={list(getattr(self, name))} was given; every value must be at least 1")
        if self.new_tokens < 2 or self.num_runs < 1:
            raise ConfigError(
                f"new_tokens={self.new_tokens} and num_runs={self.num_runs} were given; give at least 2 and at least 1"
            )
        names = [one if isinstance(one, str) else one.name for one in self.executions]
        if "dense" not in names or len(set(names)) < len(names):
            raise ConfigError(
                f"executions={','.join(names)} was given; name each once, and dense, which all are compared with"
            )


@torch.inference_mode()
def benchmark(
    model: Any,
    subject: Subject,
    plan: Plan,
    description: dict[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchmarkResult:
    """Measure the plan on a model in memory; it comes back unchanged. `description` goes into the result.

    progress: called with a name, the number of combinations done and their number.
    """
    lm: Any = causal_lm(model)
    executions = [execution_for(one, lm) for one in plan.executions]
    rows: list[BenchmarkRow] = []
    budgets: list[tuple[float | None, dict[str, float]]] = [(ratio, {}) for ratio in plan.keep_ratios]
    budgets += [(None, {"byte_share": share}) for share in plan.byte_shares]
    cases = list(product(budgets, plan.batch_sizes, plan.contexts))
    for done, ((ratio, other), batch, context) in enumerate(cases):
        if progress is not None:
            progress("decode steps", done, len(cases))
        case = Case(lm, subject(batch, context, ratio, **other), plan.new_tokens)
        measured = _measure(case, executions, plan.num_runs)
        rows += [row for execution in executions for row in measured.rows(execution)]
    measured_on = Circumstances(**circumstances(lm.device))
    return BenchmarkResult(rows=tuple(rows), subject=description, circumstances=measured_on)


def _measure(case: Case, executions: Sequence[Execution], num_runs: int) -> "_Measured":
    requests = interleaved({e.name: partial(case.request, e) for e in executions}, max(1, num_runs // 10))
    prefills = interleaved({"dense": case.prefill, "monitored": case.monitored_prefill}, max(3, num_runs // 5))
    features, decision, cache = case.decided()
    bursts = interleaved({e.name: partial(case.burst, e, features, decision, cache) for e in executions}, num_runs)
    monitoring = paired_ratio(prefills["monitored"], prefills["dense"]).median
    batch, context = case.ids.shape
    counted = partial(costs, case.lm, cache, batch=batch, context=context)
    pruned = counted(sites=case.sites, keep=decision.keep)
    return _Measured(case, decision, requests, bursts, monitoring, counted(), pruned)


@dataclass(frozen=True)
class _Measured:
    """The raw measurements of one case, by execution, and what it costs dense and pruned by counting."""

    case: Case
    decision: Decision
    requests: dict[str, list[RequestTimes]]
    bursts: dict[str, list[Burst]]
    monitoring: float
    dense: Costs
    pruned: Costs

    def rows(self, execution: Execution) -> Iterator[BenchmarkRow]:
        """One row of an execution, and one with decision and slicing spread over an answer's tokens."""
        bursts = self.bursts[execution.name]
        yield self._row(execution.name, execution, [b.step_ms for b in bursts])
        if execution.saves:
            tokens = self.case.new_tokens
            total = [b.step_ms + (b.decision_ms + b.slicing_ms) / tokens for b in bursts]
            yield self._row(f"{execution.name}_total", execution, total)

    def _ratio(self, times: Sequence[float]) -> Any:
        return paired_ratio([b.step_ms for b in self.bursts["dense"]], times)

    def _break_even(self, bursts: Sequence[Burst]) -> int | None:
        """By paired ratios, which a neighbour's load does not move."""
        dense = summary([b.step_ms for b in self.bursts["dense"]]).median
        overhead = summary([b.decision_ms for b in bursts]).median + summary([b.slicing_ms for b in bursts]).median
        return break_even_tokens(overhead, dense, dense / self._ratio([b.step_ms for b in bursts]).median)

    def _row(self, variant: str, execution: Execution, times: Sequence[float]) -> BenchmarkRow:
        (batch, context), keep = self.case.ids.shape, self.decision.keep
        bursts, requests = self.bursts[execution.name], self.requests[execution.name]
        time, ratio, saves = summary(times), self._ratio(times), execution.saves
        cost = self.pruned if saves else self.dense
        best = ceiling(self.dense.bytes, self.pruned.bytes) if execution.prunes else 1.0
        kept = float(keep_ratio(keep).mean()) if execution.prunes else 1.0
        request = [r.total_ms for r in requests]
        return BenchmarkRow(
            variant=variant,
            batch_size=batch,
            context=context,
            keep_ratio=kept,
            ms_per_token=time.median,
            ratio_to_dense=ratio.median,
            ceiling=best,
            realised_share=realised_share(ratio.median, best),
            kv_bytes=bursts[0].kv,
            peak_bytes=max((r.peak for r in requests if r.peak is not None), default=None),
            break_even_tokens=self._break_even(bursts) if saves else None,
            p20=time.p20,
            p80=time.p80,
            n=time.n,
            ratio_ci95=ratio.ci95,
            sparsity=1 - kept,
            decides="together" if rows_agree(keep) else "per row",
            weight_bytes=cost.weight_bytes,
            bytes_per_token=cost.bytes,
            prefill_flops=cost.prefill_flops,
            step_flops=cost.step_flops,
            first_token_ms=summary([r.first_token_ms for r in requests]).median,
            request_ms=summary(request).median,
            request_ratio=paired_ratio([r.total_ms for r in self.requests["dense"]], request).median,
            new_tokens=self.case.new_tokens,
            decision_ms=summary([b.decision_ms for b in bursts]).median if saves else None,
            slicing_ms=summary([b.slicing_ms for b in bursts]).median if saves else None,
            monitoring_ratio=self.monitoring if execution.prunes else None,
        )
