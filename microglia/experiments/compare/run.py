"""Measure every entry at every keep ratio and seed, on the same prompts and through the same code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any

from microglia.anatomy import input_device
from microglia.benchmark import typical_rows, typical_subject
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.experiments.compare.entries import Entry
from microglia.experiments.compare.summary import DENSE, TIMED, Run
from microglia.experiments.measure import Measured, Progress, measure
from microglia.ledger import Ledger
from microglia.pruner import Pruner
from microglia.results import BenchmarkRow, Latency, part_from_json, plain


@dataclass(frozen=True)
class Comparison:
    """setup: the prompts that are answered; held_out: others, on which keep ratios become thresholds.

    like: the agents' pruner: all entries share its gate and window, and its fill unless they have their own.
    num_runs: of the timing, 0 for none.
    """

    setup: Setup
    held_out: Setup
    like: Pruner
    num_runs: int = 20
    ledger: Ledger = field(default_factory=Ledger)
    progress: Progress | None = None

    def make(self, entry: Entry, seed: int) -> Pruner:
        """The pruner of a seed, or of a place where they are counted, with its budget."""
        report = self.progress or (lambda name, done, total: None)
        report(f"making {entry.name}", 0, 1)
        made, device = entry.make(seed), input_device(self.setup.model)
        recovery = made.recovery if made.recovery is None else made.recovery.to(device)
        report(f"making {entry.name}", 1, 1)
        policy, fill = made.policy.to(device).eval(), entry.fill or self.like.fill
        return self.held_out.calibrated(replace(self.like, policy=policy, recovery=recovery, fill=fill))

    def trained_keep_ratio(self, pruner: Pruner) -> float:
        """What a pruner keeps at the decision that it was trained to."""
        budget = self.held_out.calibrated(pruner).budget
        assert budget is not None
        return budget.keep_ratio(self.like.gate.threshold)


def compare(
    comparison: Comparison, entries: Sequence[Entry], keep_ratios: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """One run for the dense model, then one per entry, keep ratio and seed; timed for the first seed.

    An entry that has one policy for all seeds is measured once. Raises ConfigError for no or unfit ratios or seeds.
    """
    _check(entries, keep_ratios, seeds)
    prompts = {"prompts": comparison.setup.identity, "held_out": comparison.held_out.identity}
    comparison = replace(comparison, ledger=comparison.ledger.within(**prompts))
    work = partial(measure, comparison.setup, None, comparison.progress)
    runs = [Run(DENSE, 1.0, seeds[0], Measured.from_json(comparison.ledger.get({"run": DENSE}, work)))]
    for entry in entries:
        known: dict[Any, dict[str, Any]] = {}  # a score that no seed changes is measured once
        for place, seed in enumerate(seeds[: entry.count]):
            which = seed if entry.count is None else place
            make, identity = cache(partial(comparison.make, entry, which)), entry.identity(which)
            for ratio in sorted(set(keep_ratios), reverse=True):
                key = {"policy": entry.name, "is": identity, "target": ratio}
                answers = partial(_answers, comparison, make, ratio, known)
                row = comparison.ledger.get({"run": "answers", **key, "seed": seed}, answers)
                run = Run(entry.name, ratio, seed, Measured.from_json(row))
                if place == 0 and comparison.num_runs:
                    key |= {"run": "time", "runs": comparison.num_runs}
                    rows = comparison.ledger.get(key, partial(_timing, comparison, make, ratio))
                    run = replace(run, timing={n: part_from_json(Latency, row, n) for n, row in rows.items()})
                runs.append(run)
    return runs


def _check(entries: Sequence[Entry], keep_ratios: Sequence[float], seeds: Sequence[int]) -> None:
    if not keep_ratios or not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ConfigError(f"keep_ratios={list(keep_ratios)} was given; give at least one, each between 0 and 1")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={list(seeds)} was given; give at least one and none twice")
    for entry in entries:
        if entry.count not in (None, 1, len(seeds)):
            raise ConfigError(
                f"{entry.name} has {entry.count} policies but {len(seeds)} seeds were given; give one policy, or one "
                "per seed"
            )


Make = Callable[[], Pruner]


def _answers(comparison: Comparison, make: Make, ratio: float, known: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    pruner = make().at(ratio)
    same = pruner.fingerprint()
    if same not in known:
        known[same] = measure(comparison.setup, pruner, comparison.progress)
    return known[same]


def _timing(comparison: Comparison, make: Make, ratio: float) -> dict[str, Any]:
    setup = comparison.setup
    subject = typical_subject(setup.model, setup.tokenizer, setup.prompts, make())
    rows = typical_rows(setup.model, subject, ratio, setup.execution, num_runs=comparison.num_runs)
    return {variant: plain(_latency(rows[variant])) for variant in TIMED}


def _latency(row: BenchmarkRow) -> Latency:
    return Latency(**{f.name: getattr(row, f.name) for f in fields(Latency)})


def at_keep_ratio(comparison: Comparison, pruner: Pruner, keep_ratios: Sequence[float], wanted: float | None) -> float:
    """Where adaptivity is judged: what is wanted, else what the agents keep by themselves, if they prune at all."""
    if wanted is not None:
        return wanted
    kept = round(comparison.trained_keep_ratio(pruner), 2)
    return kept if 0 < kept < 1 else min(keep_ratios, key=lambda ratio: abs(ratio - kept))
