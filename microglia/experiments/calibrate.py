"""Prune as far as a promise allows: at most so much accuracy lost, with a stated confidence.

Learn then Test (Angelopoulos et al. 2021): keep ratios are tested in a fixed order, from the gentlest to
the most aggressive, each at the full error of 1 - confidence, and the first that fails ends it. Whatever the truth, a
setting that loses more than promised is chosen with a probability of at most that error, since the first of them in
the order would have to pass its test. Each test is the exact one of `experiments.drop`, on the same prompts.

The promise holds for prompts drawn like the calibration prompts, which must not have shaped policy or thresholds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from scipy import stats

from microglia.benchmark import fixed_prompts, step_speed
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.evaluation.run import Evaluation
from microglia.evaluation.setup import Setup
from microglia.experiments.drop import drop_limit, drop_p_value, prompts_needed
from microglia.experiments.ledger import Ledger
from microglia.experiments.measure import Progress, answers
from microglia.pruner import Pruner
from microglia.results import Promise, Tried
from microglia.tasks.base import Example, Task
from microglia.tasks.used import question_keys

KEEP_RATIOS = tuple(round(0.95 - 0.05 * step, 2) for step in range(14))  # 0.95, 0.9, …, 0.3
MOST_HELD_OUT = 200  # validation prompts that set the thresholds of the demo; fewer do for other trainings
EVERY_HEAD = -1e6  # a threshold that no logit falls below: the dense model


def fixed_sequence(counts: Iterable[tuple[int, int]], prompts: int, max_drop: float, confidence: float) -> int:
    """How many settings pass, in order, before the first that fails: the chosen one is the last of them.

    `counts` gives (lost, won) of each setting, gentlest first; after the first that fails no more are taken from it.
    """
    passed = 0
    for lost, won in counts:
        if drop_p_value(lost, won, prompts, max_drop, confidence) > 1 - confidence:
            break
        passed += 1
    return passed


@dataclass(frozen=True)
class Aim:
    """What is wanted: the fewest heads that can be promised to lose at most `max_drop`, with a confidence.

    keep_ratio, latency_ratio: the setting that reaches one of them instead, with the limit of what it loses; the
    gentlest of `keep_ratios` for a latency ratio, which is measured on a fixed set of prompts.
    """

    max_drop: float = 0.02
    confidence: float = 0.95
    keep_ratio: float | None = None
    latency_ratio: float | None = None
    keep_ratios: Sequence[float] = KEEP_RATIOS

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.latency_ratio is not None:
            raise ConfigError(
                f"keep_ratio={self.keep_ratio} and latency_ratio={self.latency_ratio} were given; choose one of them"
            )
        _ = prompts_needed(self.max_drop, self.confidence), _checked(self.keep_ratios)  # each checks itself


def calibrate(
    setup: Setup,
    pruner: Pruner,
    aim: Aim | None = None,
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Promise:
    """The most aggressive of the settings that can be promised to lose at most the aim's `max_drop`.

    The pruner's budget must not depend on the setup's prompts. One dense run and one run per setting, on the same
    prompts, until one fails. Raises ConfigError for what is out of range.
    """
    aim, undecided = aim or Aim(), pruner.with_threshold(0.0)
    remembered = (ledger or Ledger()).within(**setup.identity, pruner=undecided.fingerprint())
    needed, prompts, ratios = (
        prompts_needed(aim.max_drop, aim.confidence),
        len(setup.examples),
        _checked(aim.keep_ratios),
    )

    def answered(at: Pruner | None, target: float) -> Evaluation:
        """Dense where there is no pruner."""
        label = "dense" if at is None else f"keep ratio {target:g}"
        key = {"threshold": None if at is None else at.gate.threshold}
        return Evaluation.from_json(remembered.get(key, partial(answers, setup, at, label, progress)))

    keep_ratio = aim.keep_ratio
    if aim.latency_ratio is not None:
        timed = fixed_prompts(setup.model, setup.tokenizer, setup.prompts, setup.answer_tokens)
        speed = step_speed(setup.model, timed, pruner, setup.execution)
        keep_ratio = gentlest_reaching(aim.latency_ratio, speed, ratios)
    if keep_ratio is None and prompts < needed:
        return _promise(None, None, [], aim.max_drop, confidence=aim.confidence, prompts=prompts, needed=needed)
    dense, tried = answered(None, 1.0), list[Tried]()

    def counts(ratios: Iterable[float]) -> Iterator[tuple[int, int]]:
        for ratio in ratios:
            at = pruner.at(ratio)
            if tried and at.gate.threshold <= tried[-1].threshold:
                continue  # the same decisions once more
            tried.append(_tried(dense, answered(at, ratio), ratio, at.gate.threshold, aim.confidence))
            yield tried[-1].lost, tried[-1].won

    if keep_ratio is not None:
        passed, limit = len(list(counts([keep_ratio]))), None
    else:
        passed, limit = fixed_sequence(counts(ratios), prompts, aim.max_drop, aim.confidence), aim.max_drop
    chosen = tried[passed - 1] if passed else None
    return _promise(chosen, dense, tried, limit, confidence=aim.confidence, prompts=prompts)


def _promise(
    chosen: Tried | None, dense: Evaluation | None, tried: Sequence[Tried], max_drop: float | None, **rest: Any
) -> Promise:
    """The chosen setting, or the dense model, in figures and in a sentence."""
    right = dense.accuracy if dense else None
    promise = Promise(
        keep_ratio=chosen.keep_ratio if chosen else 1.0,
        keep_ratio_per_token=chosen.keep_ratio_per_token if chosen else 1.0,
        threshold=chosen.threshold if chosen else EVERY_HEAD,
        drop=chosen.drop if chosen else 0.0,
        drop_bound=min(chosen.drop_bound, math.inf if max_drop is None else max_drop) if chosen else 0.0,
        max_drop=max_drop,
        dense_accuracy=right,
        accuracy=chosen.accuracy if chosen else right,
        tried=tuple(tried),
        **rest,
    )
    return replace(promise, sentence=sentence(promise))


def sentence(promise: Promise) -> str:
    """What is promised, for people."""
    sure = f"with {promise.confidence:.0%} confidence"
    if promise.needed is not None:
        return (
            f"{promise.prompts} prompts are too few to promise a drop of at most {_points(promise.max_drop)}: {sure} "
            f"it takes at least {promise.needed}, and more where answers change; the model stays dense"
        )
    per_token = "" if promise.keep_ratio_per_token is None else f" ({promise.keep_ratio_per_token:.1%} per token)"
    kept = f"{promise.keep_ratio:.1%} of the heads are kept{per_token}; {sure} that costs at most"
    measured = f"(measured: {_points(promise.drop)} on {promise.prompts} prompts)"
    if promise.max_drop is None:
        return f"{kept} {_points(promise.drop_bound)} {measured}"
    if promise.threshold == EVERY_HEAD:
        first = promise.tried[0]
        more = more_prompts(first, promise.prompts, promise.max_drop, promise.confidence)
        hint = f"about {more} prompts might do" if more else "train longer or with less pressure"
        return (
            f"no setting can be promised to lose at most {_points(promise.max_drop)}: keeping {first.keep_ratio:.1%} "
            f"of the heads lost {first.lost} and won {first.won} of {promise.prompts} answers, a limit of "
            f"{_points(first.drop_bound)}; {hint}; the model stays dense"
        )
    return f"{kept} {_points(promise.max_drop)} against the dense model {measured}"


def unused_examples(task: Task, split: str, used: frozenset[str], *, limit: int | None, **load: Any) -> list[Example]:
    """Examples of a split without those that the policy or its thresholds know; `load` goes to the task.

    used: `question_keys` of what trained the policy, what it was evaluated on and what set its thresholds: the same
    question may stand in another split, or in another file. Raises DataError when nothing is left.
    """
    wanted = None if limit is None else limit + len(used)
    left = [e for e in task.load(split, limit=wanted, **load) if used.isdisjoint(question_keys([e.question]))][:limit]
    if not left:
        raise DataError(f"training looked at all examples of the split {split}; give another --split or more data")
    return left


def questions_used(task: Task, trained: Mapping[str, Any], **load: Any) -> frozenset[str]:
    """What `unused_examples` leaves out for a checkpoint of before, which does not say what it used; `load` as there.

    trained: the training's options, from which its examples of this task are drawn again.
    """
    seed = trained.get("seed", 0)
    parts = {"train": trained.get("limit"), "validation": max(MOST_HELD_OUT, trained.get("eval_limit", 0))}
    return question_keys(
        example.question
        for split in parts.keys() & set(task.splits)
        for example in task.load(split, limit=parts[split], **{**load, "seed": seed})
    )


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
    lost, won, margin = tried.lost / prompts, tried.won / prompts, max_drop - tried.drop
    if margin <= 0:
        return None
    more = max(prompts, float(stats.norm.ppf(confidence)) ** 2 * (lost + won) / margin**2)
    if more > 20 * prompts:
        return round(more)
    while drop_limit(round(lost * more), round(won * more), round(more), confidence) > max_drop:
        more *= 1.05
    return round(more)


def _tried(dense: Evaluation, pruned: Evaluation, target: float, threshold: float, confidence: float) -> Tried:
    pairs = [(a.correct, b.correct) for a, b in zip(dense.answers, pruned.answers, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    return Tried(
        target=target,
        threshold=threshold,
        keep_ratio=1 - pruned.sparsity,
        keep_ratio_per_token=1 - pruned.sparsity_per_token,
        accuracy=pruned.accuracy,
        lost=lost,
        won=won,
        drop=(lost - won) / len(pairs),
        drop_bound=drop_limit(lost, won, len(pairs), confidence),
    )


def _checked(keep_ratios: Sequence[float]) -> list[float]:
    """Gentlest first. Raises ConfigError for none, or one outside (0, 1)."""
    if not keep_ratios or not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ConfigError(f"keep_ratios={list(keep_ratios)} was given; give at least one, each between 0 and 1")
    return sorted(set(keep_ratios), reverse=True)


def _points(share: float | None) -> str:
    points = f"{100 * (share or 0):.3g}"
    return f"{points} point" if points == "1" else f"{points} points"
