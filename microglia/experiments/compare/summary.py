"""What a comparison says: rows with intervals, paired tests, the Pareto front, and what adapting to the input adds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from microglia.benchmark import TimedRun, request_time, step_time
from microglia.errors import DataError
from microglia.evaluation.crossed import crossed_difference, holm_corrected
from microglia.evaluation.run import Evaluation, follows_difficulty
from microglia.experiments.compare.entries import AGENTS, BASELINE
from microglia.experiments.measure import Measured, figures, losses, right
from microglia.results import Adaptivity, ComparisonResult, ComparisonRow, Difference

DENSE = "dense"


@dataclass(frozen=True)
class Run:
    """One policy at one target keep ratio with one seed. timing: of requests, on the prompts that all are timed on."""

    policy: str
    target: float
    seed: int
    measured: Measured
    timing: TimedRun | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one policy at one target, over seeds."""

    runs: Sequence[Run]

    @property
    def key(self) -> tuple[str, float]:
        return self.runs[0].policy, self.runs[0].target

    @cached_property
    def right(self) -> Any:
        return right([run.measured for run in self.runs])

    @cached_property
    def losses(self) -> Any:
        return losses([run.measured for run in self.runs])

    @property
    def keep_ratio(self) -> float:
        return float(np.mean([1 - run.measured.answers.sparsity for run in self.runs]))

    @property
    def typical(self) -> Evaluation:
        """Every prompt's mean keep ratio over seeds, on the first seed's answers."""
        first = self.runs[0].measured.answers
        kept = np.mean([[a.keep_ratio for a in run.measured.answers.answers] for run in self.runs], 0)
        answers = (replace(a, keep_ratio=k) for a, k in zip(first.answers, kept.tolist(), strict=True))
        return replace(first, answers=tuple(answers))

    @property
    def ids(self) -> list[str]:
        return [answer.id for answer in self.runs[0].measured.answers.answers]

    @property
    def keep_ratio_per_token(self) -> float:
        return float(np.mean([1 - run.measured.answers.sparsity_per_token for run in self.runs]))

    @property
    def timing(self) -> list[TimedRun]:
        return [run.timing for run in self.runs if run.timing]

    def row(self, to_dense: Difference | None = None, agents_to_this: Difference | None = None) -> ComparisonRow:
        policy, target = self.key
        return ComparisonRow(
            policy=policy,
            target=target,
            **asdict(figures([run.measured for run in self.runs])),
            mean_tokens=float(np.mean([run.measured.answers.mean_tokens for run in self.runs])),
            prompts=self.right.shape[1],
            seeds=tuple(run.seed for run in self.runs),
            request=request_time(self.timing) if self.timing else None,
            latency=step_time(self.timing) if self.timing else None,
            pareto_sparsity=False,
            to_dense=to_dense,
            agents_to_this=agents_to_this,
        )


def summarise(runs: Sequence[Run], at: float) -> ComparisonResult:
    """The result of a comparison.

    at: the target keep ratio at which agents and their static baseline are set against each other.
    Raises DataError when the runs answered different prompts, or agents or static baseline are missing there.
    """
    parts: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        parts.setdefault((run.policy, run.target), []).append(run)
    dense, *pruned = (Group(part) for part in parts.values())
    if any(group.ids != dense.ids for group in pruned):
        raise DataError("the runs answered different prompts; compare policies on the same ones")
    groups = {group.key: group for group in pruned}
    for name in (AGENTS, BASELINE):
        if (name, at) not in groups:
            raise DataError(f"there is no run of {name} at the keep ratio {at:g}; measure it there")
    agents = {target: group for (name, target), group in groups.items() if name == AGENTS}
    gains = {t: adaptivity(agents[t], g) for (name, t), g in groups.items() if name == BASELINE and t in agents}
    typical = agents[at].typical
    return ComparisonResult(
        rows=tuple(_rows(dense, groups, agents)),
        adaptivity=gains[at],
        by_keep_ratio=tuple(gains.values()),
        follows_difficulty=follows_difficulty(typical),
        sparsity_by_difficulty={str(k): v for k, v in typical.sparsity_by_difficulty.items()},
        sparsity_by_family=typical.by("family", lambda a: 1 - a.keep_ratio),
    )


def adaptivity(agents: Group, baseline: Group) -> Adaptivity:
    """What deciding by the input adds to the same loss, steps and data without input, in accuracy and in loss."""
    test = crossed_difference(agents.right, baseline.right)
    return Adaptivity(
        gain=test.diff,
        ci95=test.ci95,
        p_value=test.p_value,
        target=agents.key[1],
        keep_ratios={AGENTS: agents.keep_ratio, BASELINE: baseline.keep_ratio},
        keep_ratios_per_token={AGENTS: agents.keep_ratio_per_token, BASELINE: baseline.keep_ratio_per_token},
        loss=crossed_difference(agents.losses, baseline.losses),
    )


def _rows(dense: Group, groups: dict[tuple[str, float], Group], agents: dict[float, Group]) -> Sequence[ComparisonRow]:
    """All rows with their tests, corrected for their number, and marked where no other row beats them."""
    to_dense = holm_corrected([crossed_difference(group.right, dense.right) for group in groups.values()])
    others = [key for key in groups if key[0] != AGENTS and key[1] in agents]
    against = holm_corrected([crossed_difference(agents[key[1]].right, groups[key].right) for key in others])
    from_agents = dict(zip(others, against, strict=True))
    rows = [dense.row()]
    for (key, group), test in zip(groups.items(), to_dense, strict=True):
        rows.append(group.row(to_dense=test, agents_to_this=from_agents.get(key)))
    sparse = _pareto(rows, [Gain.known(1 - (row.keep_ratio_per_token or row.keep_ratio)) for row in rows])
    rows = [replace(row, pareto_sparsity=best) for row, best in zip(rows, sparse, strict=True)]
    speeds = [Gain(row.request.ratio_to_dense, row.request.ratio_ci95) for row in rows if row.request]
    if len(speeds) < len(rows):
        return rows
    return [replace(row, pareto_latency=best) for row, best in zip(rows, _pareto(rows, speeds), strict=True)]


@dataclass(frozen=True)
class Gain:
    """What pruning is for, more is better, with its 95 % interval."""

    value: float
    ci95: tuple[float, float]

    @classmethod
    def known(cls, value: float) -> "Gain":
        """What was counted and not measured."""
        return cls(value, (value, value))

    def surely_above(self, other: "Gain") -> bool:
        return self.ci95[0] > other.ci95[1]


def _pareto(rows: Sequence[ComparisonRow], gains: Sequence[Gain]) -> list[bool]:
    """Whether no other row is at least as good in accuracy and in the gain and surely better in one of them.

    Surely: their intervals do not overlap.
    """
    points = [(Gain(row.accuracy, row.ci95), gain) for row, gain in zip(rows, gains, strict=True)]

    def beats(one: tuple[Gain, Gain], other: tuple[Gain, Gain]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(x.value >= y.value for x, y in pairs) and any(x.surely_above(y) for x, y in pairs)

    return [not any(beats(other, point) for other in points) for point in points]


def equal_times(runs: Sequence[Run], agents: str, baseline: str) -> dict[float, float]:
    """At each target of the agents the keep ratio at which the static baseline's requests take as long as theirs.

    On straight lines between the baseline's own measured keep ratios and the dense model, whose share of its time is 1;
    1 where the agents are no faster than dense. What it then takes is measured like every other row.
    """
    groups: dict[tuple[str, float], list[TimedRun]] = {}
    for run in runs:
        if run.timing is not None:
            groups.setdefault((run.policy, run.target), []).append(run.timing)
    shares = {key: 1 / request_time(part).ratio_to_dense for key, part in groups.items()}
    known = sorted((target, share) for (name, target), share in shares.items() if name == baseline)
    targets, times = [target for target, _ in known] + [1.0], [share for _, share in known] + [1.0]
    rising = np.maximum.accumulate(times)
    found = {target: share for (name, target), share in shares.items() if name == agents}
    return {target: round(float(np.interp(share, rising, targets)), 3) for target, share in found.items()}
