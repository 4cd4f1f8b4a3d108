"""Prune as far as a promise allows: at most so much accuracy, agreement or KL lost, with a stated confidence.

Learn then Test (Angelopoulos et al. 2021): keep ratios are tested in a fixed order, from the gentlest to
the most aggressive, each at the full error of 1 - confidence, and the first that fails ends it. Whatever the truth, a
setting that loses more than promised is chosen with a probability of at most that error, since the first of them in
the order would have to pass its test. Each test is that of the loss (`experiments.losses`), on the same prompts.

The promise holds for prompts drawn like the calibration prompts, which must not have shaped policy or thresholds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

from scipy import stats

from microglia.benchmark import fixed_prompts, step_speed
from microglia.errors import ConfigError, DataError, MicrogliaError, check_choice
from microglia.evaluation.setup import Setup
from microglia.experiments.drop import drop_limit, drop_p_value
from microglia.experiments.losses import LOSSES, MOST_KL
from microglia.experiments.measure import Progress
from microglia.ledger import Ledger
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
    return passed((drop_p_value(lost, won, prompts, max_drop, confidence) for lost, won in counts), confidence)


def passed(p_values: Iterable[float], confidence: float) -> int:
    """How many settings come before the first whose test fails; after that no more p-values are taken."""
    return sum(1 for _ in takewhile(lambda p: p <= 1 - confidence, p_values))


@dataclass(frozen=True)
class Aim:
    """What is wanted: the fewest heads that can be promised to lose at most `max_drop`, with a confidence.

    loss: of accuracy, of agreement (share of a text's tokens) or kl (nats per token), see `experiments.losses`.
    keep_ratio, byte_share, latency_ratio: the setting that reaches one of them instead, with the limit of what it
    loses; the gentlest of `keep_ratios` for a latency ratio, which is measured on a fixed set of prompts.
    """

    max_drop: float = 0.02
    confidence: float = 0.95
    keep_ratio: float | None = None
    byte_share: float | None = None
    latency_ratio: float | None = None
    keep_ratios: Sequence[float] = KEEP_RATIOS
    loss: str = "accuracy"

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        wanted = {"keep_ratio": self.keep_ratio, "bytes": self.byte_share, "latency_ratio": self.latency_ratio}
        given = [f"{name}={value}" for name, value in wanted.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given; choose one of them")
        _ = self.needed, _checked(self.keep_ratios)  # each checks itself

    @property
    def needed(self) -> int:
        """The fewest prompts that could promise this."""
        return LOSSES[self.loss].needed(self.max_drop, self.confidence)


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
    loss = LOSSES[aim.loss](setup, aim.confidence, remembered, progress)
    prompts, ratios, keep_ratio = len(setup.examples), _checked(aim.keep_ratios), aim.keep_ratio
    if aim.latency_ratio is not None:
        timed = fixed_prompts(setup.model, setup.tokenizer, setup.prompts, setup.answer_tokens)
        speed = step_speed(setup.model, timed, pruner, setup.execution)
        keep_ratio = gentlest_reaching(aim.latency_ratio, speed, ratios)
    fixed = None if keep_ratio is None and aim.byte_share is None else pruner.at(keep_ratio, byte_share=aim.byte_share)
    if fixed is None and prompts < aim.needed:
        return _promise(aim, None, [], aim.max_drop, prompts=prompts, needed=aim.needed)
    tried = list[Tried]()

    def settings(ratios: Iterable[float]) -> Iterator[Tried]:
        for ratio in ratios:
            at = pruner.at(ratio)
            if tried and at.gate.threshold <= tried[-1].threshold:
                continue  # the same decisions once more
            tried.append(loss.tried(at, ratio))
            yield tried[-1]

    if fixed is not None:
        assert fixed.budget is not None
        target = fixed.budget.keep_ratio(fixed.gate.threshold) if keep_ratio is None else keep_ratio
        tried.append(loss.tried(fixed, target))
        count, limit = 1, None
    else:
        count, limit = (
            passed((loss.p_value(one, aim.max_drop) for one in settings(ratios)), aim.confidence),
            aim.max_drop,
        )
    chosen = tried[count - 1] if count else None
    return _promise(aim, chosen, tried, limit, prompts=prompts, dense_accuracy=loss.dense_accuracy)


def _promise(
    aim: Aim,
    chosen: Tried | None,
    tried: Sequence[Tried],
    max_drop: float | None,
    *,
    dense_accuracy: float | None = None,
    **rest: Any,
) -> Promise:
    """The chosen setting, or the dense model, in figures and in a sentence."""
    promise = Promise(
        keep_ratio=chosen.keep_ratio if chosen else 1.0,
        keep_ratio_per_token=chosen.keep_ratio_per_token if chosen else 1.0,
        threshold=chosen.threshold if chosen else EVERY_HEAD,
        drop=chosen.drop if chosen else 0.0,
        drop_bound=min(chosen.drop_bound, math.inf if max_drop is None else max_drop) if chosen else 0.0,
        max_drop=max_drop,
        dense_accuracy=dense_accuracy,
        accuracy=chosen.accuracy if chosen else dense_accuracy,
        tried=tuple(tried),
        confidence=aim.confidence,
        loss=aim.loss,
        **rest,
    )
    return replace(promise, sentence=sentence(promise))


def sentence(promise: Promise) -> str:
    """What is promised, for people."""
    sure, amount = f"with {promise.confidence:.0%} confidence", partial(lost, promise.loss)
    if promise.needed is not None:
        return (
            f"{promise.prompts} prompts are too few to promise a drop of at most {amount(promise.max_drop)}: {sure} "
            f"it takes at least {promise.needed}, and more where answers change; the model stays dense"
        )
    per_token = "" if promise.keep_ratio_per_token is None else f" ({promise.keep_ratio_per_token:.1%} per token)"
    kept = f"{promise.keep_ratio:.1%} of the heads are kept{per_token}; {sure} that costs at most"
    measured = f"(measured: {amount(promise.drop)} on {promise.prompts} prompts)"
    if promise.max_drop is None:
        return f"{kept} {amount(promise.drop_bound)} {measured}"
    if promise.threshold == EVERY_HEAD:
        first = promise.tried[0]
        more = more_prompts(first, promise.prompts, promise.max_drop, promise.confidence)
        hint = f"about {more} prompts might do" if more else "train longer or with less pressure"
        found = amount(first.drop)
        if first.lost is not None:
            found = f"{first.lost} and won {first.won} of {promise.prompts} answers"
        return (
            f"no setting can be promised to lose at most {amount(promise.max_drop)}: keeping {first.keep_ratio:.1%} "
            f"of the heads lost {found}, a limit of {amount(first.drop_bound)}; {hint}; the model stays dense"
        )
    return f"{kept} {amount(promise.max_drop)} against the dense model {measured}"


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
    """Roughly how many prompts would do if lost and won answers went on in the same proportions.

    None if none would, and for losses that count no answers.
    """
    margin = max_drop - tried.drop
    if margin <= 0 or tried.lost is None or tried.won is None:
        return None
    lost, won = tried.lost / prompts, tried.won / prompts
    more = max(prompts, float(stats.norm.ppf(confidence)) ** 2 * (lost + won) / margin**2)
    if more > 20 * prompts:
        return round(more)
    while drop_limit(round(lost * more), round(won * more), round(more), confidence) > max_drop:
        more *= 1.05
    return round(more)


def _checked(keep_ratios: Sequence[float]) -> list[float]:
    """Gentlest first. Raises ConfigError for none, or one outside (0, 1)."""
    if not keep_ratios or not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ConfigError(f"keep_ratios={list(keep_ratios)} was given; give at least one, each between 0 and 1")
    return sorted(set(keep_ratios), reverse=True)


def lost(loss: str, drop: float | None) -> str:
    """A drop in the words of its loss: points of accuracy, tokens, or nats."""
    if loss == "agreement":
        return f"{100 * (drop or 0):.3g}% of a text's tokens"
    if loss == "kl":
        return f"{drop or 0:.3g} nats per token (a text counts as {MOST_KL:g} at most)"
    points = f"{100 * (drop or 0):.3g}"
    return f"{points} point" if points == "1" else f"{points} points"
