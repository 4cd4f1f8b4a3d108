"""What a comparison says: rows with intervals, paired tests, the Pareto front, and what adapting to the input adds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from microglia.compare.contenders import AGENTS, TWIN
from microglia.errors import DataError
from microglia.evaluation.crossed import Difference, crossed_difference, crossed_mean, holm
from microglia.evaluation.run import Evaluation, follows_difficulty
from microglia.evaluation.significance import wilson_ci

TIMES = ("ms_per_token", "ratio_to_dense", "ratio_ci95", "ceiling", "realised_share", "kv_bytes")


@dataclass(frozen=True)
class Timing:
    """Rows of the benchmark on a typical prompt, dense and compact, as dicts."""

    dense: dict[str, Any]
    compact: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One policy at one target keep ratio with one seed: its answers, the losses of the worked answers, its time."""

    policy: str
    target: float
    seed: int
    run: Evaluation
    losses: tuple[float, ...]
    timing: Timing | None = None


class Group:
    """The cells of one policy at one target, over seeds: tables of (S, N)."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells, self.policy, self.target = cells, cells[0].policy, cells[0].target
        self.correct = np.array([[float(a.correct) for a in cell.run.answers] for cell in cells])
        self.losses = np.array([cell.losses for cell in cells])

    @property
    def keep_ratio(self) -> float:
        return float(np.mean([1 - cell.run.sparsity for cell in self.cells]))

    @property
    def typical(self) -> Evaluation:
        """Every prompt's mean keep ratio over seeds, on the first seed's answers."""
        first = self.cells[0].run
        kept = np.mean([[a.keep_ratio for a in cell.run.answers] for cell in self.cells], 0)
        answers = (replace(a, keep_ratio=k) for a, k in zip(first.answers, kept.tolist(), strict=True))
        return replace(first, answers=tuple(answers))

    @property
    def ids(self) -> list[str]:
        return [answer.id for answer in self.cells[0].run.answers]

    def row(self) -> dict[str, Any]:
        accuracy, loss = crossed_mean(self.correct), crossed_mean(self.losses)
        one = len(self.cells) == 1 or float(np.ptp(self.correct)) == 0
        right, prompts = int(self.correct[0].sum()), self.correct.shape[1]
        timing = next((cell.timing for cell in self.cells if cell.timing), None)
        return {
            "policy": self.policy,
            "keep_ratio": self.keep_ratio,
            "target": self.target,
            "accuracy": accuracy.mean,
            "ci95": list(wilson_ci(right, prompts) if one else accuracy.ci95),
            "loss": loss.mean,
            "loss_ci95": list(loss.ci95),
            "mean_tokens": float(np.mean([cell.run.mean_tokens for cell in self.cells])),
            **{name: timing.compact[name] if timing else None for name in TIMES},
            "timed_keep_ratio": timing.compact["keep_ratio"] if timing else None,
            "prompts": prompts,
            "seeds": [cell.seed for cell in self.cells],
        }


def summarise(cells: Sequence[Cell], at: float) -> dict[str, Any]:
    """`rows`, `adaptivity`, `follows_difficulty` and `sparsity_by_family` of a comparison.

    at: the target keep ratio at which agents and their static twin are set against each other.
    Raises DataError when the cells answered different prompts, or agents or twin are missing there.
    """
    parts: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        parts.setdefault((cell.policy, cell.target), []).append(cell)
    groups = [Group(part) for part in parts.values()]
    if any(group.ids != groups[0].ids for group in groups):
        raise DataError("the cells answered different prompts; compare policies on the same ones")
    dense, pruned = groups[0], groups[1:]
    found = {(group.policy, group.target): group for group in pruned}
    for name in (AGENTS, TWIN):
        if (name, at) not in found:
            raise DataError(f"there is no cell of {name} at the keep ratio {at:g}; measure it there")
    rows = [_dense_row(dense, pruned), *(group.row() for group in pruned)]
    _add_tests(rows[1:], "", [crossed_difference(g.correct, dense.correct) for g in pruned])
    others = [g for g in pruned if g.policy != AGENTS and (AGENTS, g.target) in found]
    against = [crossed_difference(found[AGENTS, g.target].correct, g.correct) for g in others]
    by_key = {(row["policy"], row["target"]): row for row in rows}
    _add_tests([by_key[g.policy, g.target] for g in others], "agents_", against)
    _mark_pareto(rows, "pareto_sparsity", [1 - row["keep_ratio"] for row in rows])
    if all(row["ratio_to_dense"] is not None for row in rows):
        _mark_pareto(rows, "pareto_latency", [row["ratio_to_dense"] for row in rows])
    agents = found[AGENTS, at]
    typical = agents.typical
    return {
        "rows": rows,
        "adaptivity": adaptivity(agents, found[TWIN, at], at)
        | {"by_keep_ratio": [_gain(found[AGENTS, t], g) for (name, t), g in found.items() if name == TWIN]},
        "follows_difficulty": follows_difficulty(typical),
        "sparsity_by_difficulty": {str(k): v for k, v in typical.sparsity_by_difficulty.items()},
        "sparsity_by_family": typical.by("family", lambda a: 1 - a.keep_ratio),
    }


def adaptivity(agents: Group, twin: Group, at: float) -> dict[str, Any]:
    """What deciding by the input adds to the same loss, steps and data without input, in accuracy and in loss."""
    loss = crossed_difference(agents.losses, twin.losses)
    return {
        **_gain(agents, twin),
        "at_keep_ratio": at,
        "loss_difference": loss.diff,
        "loss_ci95": list(loss.ci95),
    }


def _gain(agents: Group, twin: Group) -> dict[str, Any]:
    found = crossed_difference(agents.correct, twin.correct)
    return {
        "gain": found.diff,
        "ci95": list(found.ci95),
        "p_value": found.p_value,
        "target": agents.target,
        "keep_ratios": {AGENTS: agents.keep_ratio, TWIN: twin.keep_ratio},
    }


def _dense_row(dense: Group, pruned: Sequence[Group]) -> dict[str, Any]:
    """The dense row; its time is the median over the benchmarks of the others, in each of which it took part."""
    row = dense.row()
    timed = [cell.timing.dense for group in pruned for cell in group.cells if cell.timing]
    if timed:
        row |= {name: timed[0][name] for name in TIMES} | {"timed_keep_ratio": 1.0}
        row["ms_per_token"] = float(np.median([t["ms_per_token"] for t in timed]))
    return row


def _add_tests(rows: Sequence[dict[str, Any]], prefix: str, tests: Sequence[Difference]) -> None:
    """Difference, interval, p-value and Holm's p-value over all these tests, into the rows."""
    for row, test, adjusted in zip(rows, tests, holm([t.p_value for t in tests]), strict=True):
        row[f"{prefix}diff"], row[f"{prefix}diff_ci95"] = test.diff, list(test.ci95)
        row[f"{prefix}p_value"], row[f"{prefix}p_holm"] = test.p_value, adjusted


def _mark_pareto(rows: Sequence[dict[str, Any]], name: str, gains: Sequence[float]) -> None:
    """Whether no other row is at least as good in accuracy and in the gain, and better in one of them."""
    points = [(row["accuracy"], gain) for row, gain in zip(rows, gains, strict=True)]
    for row, (accuracy, gain) in zip(rows, points, strict=True):
        row[name] = not any(a >= accuracy and g >= gain and (a, g) != (accuracy, gain) for a, g in points)
