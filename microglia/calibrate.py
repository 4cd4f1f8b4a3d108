"""Turn the dial as far as a promise allows: at most so much accuracy lost, with a stated confidence.

Learn then Test (Angelopoulos et al. 2021): the settings of the dial are tested in a fixed order, from the gentlest to
the most aggressive, each at the full error of 1 - confidence, and the first that fails ends it. Whatever the truth, a
setting that loses more than promised is chosen with a probability of at most that error, since the first of them in
the order would have to pass its test. Each test is the exact one of `evaluation.drop`, on the same prompts.

The promise holds for prompts drawn like the calibration prompts, which must not have shaped policy or thresholds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from microglia.benchmark import typical_speed
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.evaluation.bench import Bench, as_json, from_json
from microglia.evaluation.drop import drop_limit, drop_p_value, prompts_needed
from microglia.evaluation.run import Evaluation
from microglia.gate import Gate
from microglia.ledger import Ledger
from microglia.policy import Policy
from microglia.tasks.base import Example, Task

KEEP_RATIOS = tuple(round(0.95 - 0.05 * step, 2) for step in range(14))  # 0.95, 0.9, …, 0.3
EVERY_HEAD = -1e6  # a threshold that no logit falls below: the dense model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tried:
    """One setting of the dial: what was asked for (`target`), what it kept, and what that cost.

    lost, won: answers that were right dense only, and pruned only. drop_bound: the drop's upper limit for this setting.
    """

    target: float
    threshold: float
    keep_ratio: float
    accuracy: float
    lost: int
    won: int
    drop: float
    drop_bound: float


@dataclass(frozen=True)
class Calibrated:
    """The setting that was chosen, and all that were tried, gentlest first.

    keep_ratio: mean over the prompts; 1 for the dense model, when nothing could be promised. max_drop: the promise;
    None when a keep ratio or a speed was asked for. drop_bound: at most max_drop, and for a setting that was asked for
    a limit at the same confidence; for a chosen one it makes no allowance for the choice, which max_drop does.
    needed: prompts without which nothing can be promised; told when they were too few.
    """

    keep_ratio: float
    threshold: float
    drop: float
    drop_bound: float
    confidence: float
    prompts: int
    max_drop: float | None
    dense_accuracy: float | None
    accuracy: float | None
    tried: tuple[Tried, ...] = ()
    needed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints and the checkpoint remembers."""
        return {**asdict(self), "tried": [asdict(t) for t in self.tried]}

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        sure = f"with {self.confidence:.0%} confidence"
        if self.needed is not None:
            return (
                f"{self.prompts} prompts are too few to promise a drop of at most {_points(self.max_drop)}: {sure} it "
                f"takes at least {self.needed}, and more where answers change; the model stays dense"
            )
        if self.max_drop is None:
            return (
                f"{self.keep_ratio:.1%} of the heads are kept; {sure} that costs at most {_points(self.drop_bound)} "
                f"(measured: {_points(self.drop)} on {self.prompts} prompts)"
            )
        if self.threshold == EVERY_HEAD:
            first = self.tried[0]
            more = more_prompts(first, self.prompts, self.max_drop, self.confidence)
            hint = f"about {more} prompts might do" if more else "train longer or with less pressure"
            return (
                f"no setting can be promised to lose at most {_points(self.max_drop)}: keeping {first.keep_ratio:.1%} "
                f"of the heads lost {first.lost} and won {first.won} of {self.prompts} answers, a limit of "
                f"{_points(first.drop_bound)}; {hint}; the model stays dense"
            )
        return (
            f"{self.keep_ratio:.1%} of the heads are kept; {sure} that costs at most {_points(self.max_drop)} "
            f"against the dense model (measured: {_points(self.drop)} on {self.prompts} prompts)"
        )


def fixed_sequence(counts: Iterable[tuple[int, int]], prompts: int, max_drop: float, confidence: float) -> int:
    """How many settings pass, in order, before the first that fails: the chosen one is the last of them.

    `counts` gives (lost, won) of each setting, gentlest first, and is not asked for more than is needed.
    """
    passed = 0
    for lost, won in counts:
        if drop_p_value(lost, won, prompts, max_drop, confidence) > 1 - confidence:
            break
        passed += 1
    return passed


def turn(
    bench: Bench,
    policy: Policy,
    gate_at: Callable[[float | None], Gate],
    *,
    max_drop: float = 0.02,
    confidence: float = 0.95,
    keep_ratio: float | None = None,
    latency_ratio: float | None = None,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """The most aggressive of the settings that can be promised to lose at most `max_drop`.

    keep_ratio, latency_ratio: the setting that reaches one of them instead, with the limit of what it loses; the
    gentlest of `keep_ratios` for a latency ratio, which is measured on a typical prompt of the bench.
    `gate_at` turns a target keep ratio into a gate and must not have seen the bench's prompts. One dense run and one
    run per setting, on the same prompts, until one fails. Raises ConfigError for what is out of range.
    """
    if keep_ratio is not None and latency_ratio is not None:
        raise ConfigError(f"keep_ratio={keep_ratio} and latency_ratio={latency_ratio} were given; choose one of them")
    needed, prompts, ratios = prompts_needed(max_drop, confidence), len(bench.examples), _checked(keep_ratios)
    answered = _answering(bench, policy, ledger or Ledger(), progress)
    if latency_ratio is not None:
        speed = typical_speed(bench.model, bench.tokenizer, bench.prompts, policy, gate_at, look=bench.look)
        keep_ratio = gentlest_reaching(latency_ratio, speed, ratios)
    if keep_ratio is not None:
        gate = gate_at(keep_ratio)
        dense = answered(None, 1.0)
        asked = _tried(dense, answered(gate, keep_ratio), keep_ratio, gate, confidence)
        return _result(asked, dense, [asked], confidence, None, asked.drop_bound)
    if prompts < needed:
        return Calibrated(1.0, EVERY_HEAD, 0.0, 0.0, confidence, prompts, max_drop, None, None, needed=needed)
    dense, tried = answered(None, 1.0), list[Tried]()

    def counts() -> Iterator[tuple[int, int]]:
        for ratio in ratios:
            gate = gate_at(ratio)
            if tried and gate.threshold <= tried[-1].threshold:
                continue  # the same decisions once more
            tried.append(_tried(dense, answered(gate, ratio), ratio, gate, confidence))
            yield tried[-1].lost, tried[-1].won

    passed = fixed_sequence(counts(), prompts, max_drop, confidence)
    if not passed:
        right = dense.accuracy
        return Calibrated(1.0, EVERY_HEAD, 0.0, 0.0, confidence, prompts, max_drop, right, right, tuple(tried))
    chosen = tried[passed - 1]
    return _result(chosen, dense, tried, confidence, max_drop, min(chosen.drop_bound, max_drop))


def unseen(
    task: Task, split: str, trained: Mapping[str, Any] | None, at_least: int, *, limit: int | None, **load: Any
) -> list[Example]:
    """Examples of a split without those that a training on this task looked at; `load` goes to the task.

    trained: the training's options, None when there was none on this task. Of the validation split it saw as many as it
    evaluated on, and `at_least` so many for the dial. Raises ConfigError for the split that was trained on, DataError
    when nothing is left.
    """
    if trained is None or split not in ("train", "validation"):
        return task.load(split, limit=limit, **load)
    if split == "train":
        raise ConfigError("split='train' was given, but the policy was trained on it; give validation or test")
    most, seed = max(at_least, trained.get("eval_limit", 0)), trained.get("seed", 0)
    seen = {example.id for example in task.load(split, limit=most, **{**load, "seed": seed})}
    wanted = None if limit is None else limit + len(seen)
    left = [example for example in task.load(split, limit=wanted, **load) if example.id not in seen][:limit]
    if not left:
        raise DataError(f"training looked at all examples of the split {split}; give another --split or more data")
    return left


def gentlest_reaching(
    ratio: float, speed: Callable[[float], float], keep_ratios: Sequence[float] = KEEP_RATIOS
) -> float:
    """The largest keep ratio at which `speed` (dense time ÷ pruned time) reaches `ratio`, by bisection.

    Raises ConfigError for a ratio of 1 or less, MicrogliaError when not even the smallest keep ratio reaches it.
    """
    if not ratio > 1:
        raise ConfigError(f"latency_ratio={ratio} was given; it is dense time ÷ pruned time and must be above 1")
    ratios = _checked(keep_ratios)
    best = speed(ratios[-1])
    if best < ratio:
        raise MicrogliaError(
            f"a latency ratio of {ratio} was asked for, but keeping {ratios[-1]:.0%} of the heads reaches {best:.2f} "
            "here; ask for less, allow smaller keep ratios, or time larger batches and longer prompts"
        )
    slow, fast = -1, len(ratios) - 1  # the first setting that is fast enough lies in (slow, fast]
    while fast - slow > 1:
        middle = (slow + fast) // 2
        if speed(ratios[middle]) >= ratio:
            fast = middle
        else:
            slow = middle
    return ratios[fast]


def more_prompts(tried: Tried, prompts: int, max_drop: float, confidence: float) -> int | None:
    """Roughly how many prompts would do if lost and won answers went on in the same proportions; None if none would."""
    lost, won, room = tried.lost / prompts, tried.won / prompts, max_drop - tried.drop
    if room <= 0:
        return None
    more = max(prompts, float(stats.norm.ppf(confidence)) ** 2 * (lost + won) / room**2)
    if more > 20 * prompts:
        return round(more)
    while drop_limit(round(lost * more), round(won * more), round(more), confidence) > max_drop:
        more *= 1.05
    return round(more)


def _answering(
    bench: Bench, policy: Policy, ledger: Ledger, progress: Progress | None
) -> Callable[[Gate | None, float], Evaluation]:
    """Answers at a gate, dense at None; from the ledger when they are in it."""

    def answered(gate: Gate | None, target: float) -> Evaluation:
        name = "dense" if gate is None else f"keep ratio {target:g}"
        update = (lambda done, total: progress(name, done, total)) if progress else None
        key = {"gate": None if gate is None else asdict(gate)}
        return from_json(
            ledger.get(key, lambda: as_json(bench.answers(None if gate is None else policy, gate, update)))
        )

    return answered


def _tried(dense: Evaluation, pruned: Evaluation, target: float, gate: Gate, confidence: float) -> Tried:
    pairs = [(a.correct, b.correct) for a, b in zip(dense.answers, pruned.answers, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    limit = drop_limit(lost, won, len(pairs), confidence)
    return Tried(
        target=target,
        threshold=gate.threshold,
        keep_ratio=1 - pruned.sparsity,
        accuracy=pruned.accuracy,
        lost=lost,
        won=won,
        drop=(lost - won) / len(pairs),
        drop_bound=limit,
    )


def _result(
    chosen: Tried, dense: Evaluation, tried: Sequence[Tried], confidence: float, max_drop: float | None, bound: float
) -> Calibrated:
    return Calibrated(
        chosen.keep_ratio,
        chosen.threshold,
        chosen.drop,
        bound,
        confidence,
        len(dense.answers),
        max_drop,
        dense.accuracy,
        chosen.accuracy,
        tuple(tried),
    )


def _checked(keep_ratios: Sequence[float]) -> list[float]:
    """Gentlest first. Raises ConfigError for none, or one outside (0, 1)."""
    if not keep_ratios or not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ConfigError(f"keep_ratios={list(keep_ratios)} was given; give at least one, each between 0 and 1")
    return sorted(set(keep_ratios), reverse=True)


def _points(share: float | None) -> str:
    points = f"{100 * (share or 0):.3g}"
    return f"{points} point" if points == "1" else f"{points} points"
