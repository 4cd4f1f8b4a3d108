"""Measure every entry at every keep ratio and seed, on the same prompts and through the same code."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

from microglia.anatomy import input_device
from microglia.benchmark import TimedPrompt, TimedRun, fixed_prompts, time_requests
from microglia.benchmark.requests import PROMPTS
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.experiments.compare.controls import EQUAL_TIME
from microglia.experiments.compare.entries import AGENTS, BASELINE, Entry
from microglia.experiments.compare.summary import DENSE, Run, equal_times
from microglia.experiments.measure import Measured, Progress, measure
from microglia.ledger import Ledger
from microglia.pruner import Pruner


@dataclass(frozen=True)
class Comparison:
    """setup: the prompts that are answered; held_out: others, on which keep ratios become thresholds.

    like: the agents' pruner: all entries share its gate and window, and its fill unless they have their own.
    num_runs: of the timing, 0 for none. timed_prompts: how many prompts all are timed on.
    """

    setup: Setup
    held_out: Setup
    like: Pruner
    num_runs: int = 5
    timed_prompts: int = PROMPTS
    ledger: Ledger = field(default_factory=Ledger)
    progress: Progress | None = None

    def make(self, entry: Entry, seed: int) -> Pruner:
        """The pruner of a seed, or of a place where they are counted, with its budget."""
        report = self.progress or (lambda name, done, total: None)
        report(f"making {entry.name}", 0, 1)
        made = self._calibrated(entry, entry.make(seed))
        report(f"making {entry.name}", 1, 1)
        return made

    def _calibrated(self, entry: Entry, made: Pruner) -> Pruner:
        device = input_device(self.setup.model)
        recovery = made.recovery if made.recovery is None else made.recovery.to(device)
        policy, fill = made.policy.to(device).eval(), entry.fill or self.like.fill
        return self.held_out.calibrated(replace(self.like, policy=policy, recovery=recovery, fill=fill))

    def at(self, entry: Entry, pruner: Pruner, ratio: float) -> Pruner:
        """The entry at a keep ratio. A control is made of the agents there, whose pruner is given."""
        if entry.of_agents is not None:
            control = replace(pruner, policy=entry.of_agents(pruner.at(ratio), self.held_out))
            pruner = self._calibrated(entry, control)
        return pruner.at(ratio)

    def trained_keep_ratio(self, pruner: Pruner) -> float:
        """What a pruner keeps at the decision that it was trained to."""
        budget = self.held_out.calibrated(pruner).budget
        assert budget is not None
        return budget.keep_ratio(self.like.gate.threshold)


def compare(
    comparison: Comparison, entries: Sequence[Entry], keep_ratios: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """One run for the dense model, then one per entry, keep ratio and seed, each timed on the same prompts.

    The dense model is timed against itself (A/A). An entry that has one policy for all seeds is measured once. Raises
    ConfigError for no or unfit ratios or seeds.
    """
    _check(comparison, entries, keep_ratios, seeds)
    prompts = {"prompts": comparison.setup.identity, "held_out": comparison.held_out.identity}
    comparison = replace(comparison, ledger=comparison.ledger.within(**prompts))
    work = partial(measure, comparison.setup, None, comparison.progress)
    dense = Run(DENSE, 1.0, seeds[0], Measured.from_json(comparison.ledger.get({"run": DENSE}, work)))
    clock = _Clock(comparison, dense)
    runs = [replace(dense, timing=clock.time({"policy": DENSE}, lambda: None))]
    ratios = {ratio: ratio for ratio in sorted(set(keep_ratios), reverse=True)}
    for entry in sorted(entries, key=lambda entry: entry.name == EQUAL_TIME):  # last: it needs the others' times
        at = equal_times(runs, AGENTS, BASELINE) if entry.name == EQUAL_TIME else ratios
        runs += _runs(comparison, clock, entry, at, seeds)
    return runs


def _runs(
    comparison: Comparison, clock: "_Clock", entry: Entry, ratios: dict[float, float], seeds: Sequence[int]
) -> Iterator[Run]:
    """An entry at each of the ratios, whose keys are the targets that it is listed under."""
    known: dict[Any, dict[str, Any]] = {}  # a score that no seed changes is measured once
    for place, seed in enumerate(seeds[: entry.count]):
        which = seed if entry.count is None else place
        make, identity = cache(partial(comparison.make, entry, which)), entry.identity(which)
        for target, ratio in ratios.items():
            key = {"policy": entry.name, "is": identity, "target": ratio}
            pruner = cache(lambda make=make, ratio=ratio: comparison.at(entry, make(), ratio))
            answers = partial(_answers, comparison, pruner, known)
            row = comparison.ledger.get({"run": "answers", **key, "seed": seed}, answers)
            timing = clock.time({**key, "seed": seed}, pruner)
            yield Run(entry.name, target, seed, Measured.from_json(row), timing)


class _Clock:
    """Times requests on one set of prompts, as long as the dense model's answers to them."""

    def __init__(self, comparison: Comparison, dense: Run) -> None:
        self.comparison = comparison
        self.lengths = [answer.new_tokens for answer in dense.measured.answers.answers]
        self.prompts = cache(self._prompts)

    def _prompts(self) -> list[TimedPrompt]:
        setup = self.comparison.setup
        count = self.comparison.timed_prompts
        return fixed_prompts(setup.model, setup.tokenizer, setup.prompts, self.lengths, count=count)

    def time(self, key: dict[str, Any], pruner: "Make | Callable[[], None]") -> TimedRun | None:
        """The requests of a pruner, or of the dense model; None where nothing is timed."""
        c = self.comparison
        if not c.num_runs:
            return None

        def work() -> dict[str, Any]:
            if c.progress:
                c.progress("timing", 0, 1)
            timed = time_requests(c.setup.model, self.prompts(), pruner(), c.setup.execution, num_runs=c.num_runs)
            return asdict(timed)

        how = {"run": "requests", "runs": c.num_runs, "timed_prompts": c.timed_prompts}
        return TimedRun.from_json(c.ledger.get({**how, **key}, work))


def _check(
    comparison: Comparison, entries: Sequence[Entry], keep_ratios: Sequence[float], seeds: Sequence[int]
) -> None:
    if not comparison.num_runs and any(entry.name == EQUAL_TIME for entry in entries):
        raise ConfigError(f"num_runs=0 was given with the control {EQUAL_TIME!r}, which needs times; give some runs")
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


def _answers(comparison: Comparison, make: Make, known: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    pruner = make()
    same = pruner.fingerprint()
    if same not in known:
        known[same] = measure(comparison.setup, pruner, comparison.progress)
    return known[same]


def at_keep_ratio(comparison: Comparison, pruner: Pruner, keep_ratios: Sequence[float], wanted: float | None) -> float:
    """Where adaptivity is judged: what is wanted, else what the agents keep by themselves, if they prune at all."""
    if wanted is not None:
        return wanted
    kept = round(comparison.trained_keep_ratio(pruner), 2)
    return kept if 0 < kept < 1 else min(keep_ratios, key=lambda ratio: abs(ratio - kept))
