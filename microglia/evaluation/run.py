"""Answer examples and judge the answers: accuracy, sparsity, output length and time from one and the same run."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from microglia import processes
from microglia.errors import DataError
from microglia.evaluation.answer_limit import limits, stopping_at
from microglia.evaluation.heads import HeadMeans
from microglia.evaluation.significance import mcnemar_exact, paired_difference, spearman_ci, wilson_ci
from microglia.execution import execution_for
from microglia.gate import keep_ratio
from microglia.generation import generate
from microglia.pruner import Pruner
from microglia.results import Correlation, Difference, Summary

if TYPE_CHECKING:
    from microglia.evaluation.setup import Setup

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """One example's answer and what it cost: `new_tokens` without padding, `keep_ratio` 1.0 when dense.

    `choices` are the log-probabilities of the choices where the answer was chosen by likelihood.
    """

    id: str
    text: str
    correct: bool
    keep_ratio: float
    new_tokens: int
    difficulty: int
    family: str
    choices: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Answers in the order of the examples, and the seconds that generating them took.

    `heads`: per site and head how often it was `kept`, and its mean signals; empty when dense.
    """

    answers: tuple[Answer, ...]
    seconds: float
    heads: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return _mean([a.correct for a in self.answers])

    @property
    def sparsity(self) -> float:
        return 1 - _mean([a.keep_ratio for a in self.answers])

    @property
    def sparsity_per_token(self) -> float:
        """The same over all tokens of the answers, which is what time is spent on: long answers count for more."""
        tokens = sum(a.new_tokens for a in self.answers)
        kept = sum(a.new_tokens * a.keep_ratio for a in self.answers)
        return 1 - kept / tokens if tokens else self.sparsity

    @property
    def mean_tokens(self) -> float:
        """Mean length of the answers: a hurt model rambles, and wall time grows with it."""
        return _mean([a.new_tokens for a in self.answers])

    def by(self, key: str, value: Callable[[Answer], float]) -> dict[Any, float]:
        """Mean of `value` per value of an attribute of the answers, sorted."""
        groups: dict[Any, list[float]] = defaultdict(list)
        for answer in self.answers:
            groups[getattr(answer, key)].append(value(answer))
        return {name: _mean(groups[name]) for name in sorted(groups)}

    @property
    def accuracy_by_difficulty(self) -> dict[int, float]:
        return self.by("difficulty", lambda a: a.correct)

    @property
    def sparsity_by_difficulty(self) -> dict[int, float]:
        return self.by("difficulty", lambda a: 1 - a.keep_ratio)

    def summary(self, dense: "Evaluation | None" = None) -> Summary:
        """Everything but the answers, with the difference to `dense` if it is given."""
        return Summary(
            prompts=len(self.answers),
            accuracy=self.accuracy,
            accuracy_ci95=wilson_ci(sum(a.correct for a in self.answers), len(self.answers)),
            sparsity=self.sparsity,
            sparsity_per_token=self.sparsity_per_token,
            accuracy_by_difficulty={str(k): v for k, v in self.accuracy_by_difficulty.items()},
            sparsity_by_difficulty={str(k): v for k, v in self.sparsity_by_difficulty.items()},
            accuracy_by_family=self.by("family", lambda a: a.correct),
            sparsity_by_family=self.by("family", lambda a: 1 - a.keep_ratio),
            mean_tokens=self.mean_tokens,
            seconds=self.seconds,
            heads=self.heads,
            to_dense=None if dense is None else paired(dense, self),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per answer."""
        rows = [asdict(answer) for answer in self.answers]
        return [{name: value for name, value in row.items() if name != "choices" or value} for row in rows]

    def to_json(self) -> dict[str, Any]:
        """For a ledger."""
        return {"answers": self.rows(), "seconds": self.seconds}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Evaluation":
        """What `to_json` gave."""
        return cls(tuple(Answer(**answer) for answer in row["answers"]), row["seconds"])


@dataclass(frozen=True)
class _Answered:
    """One batch: answers by the index of their example, the heads' sums, the seconds, and the process that did it."""

    answers: dict[int, Answer]
    heads: HeadMeans
    seconds: float
    process: int


def evaluate(setup: "Setup", pruner: Pruner | None = None, progress: Progress | None = None) -> Evaluation:
    """Greedy answers to the setup's examples in batches of similar length, dense without a pruner.

    `progress(done, total)` is called after every batch. Of several processes (torchrun) each answers a share of the
    batches, and all return the whole; `seconds` are then those of the slowest. Raises DataError when there is no
    example.
    """
    examples, tokenizer = setup.examples, setup.tokenizer
    if not examples:
        raise DataError("there is no example to evaluate; give at least one, or a larger limit")
    processes.join()
    prompts = setup.prompts
    most = limits(tokenizer, examples, setup.answer_limit, setup.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (most[i], len(prompts[i])))
    batches = [order[start : start + setup.batch_size] for start in range(0, len(order), setup.batch_size)]
    execution = execution_for(setup.execution, setup.model)  # once: what it keeps serves all batches
    units = None if pruner is None else [site.unit for site in pruner.sites(setup.model)]
    done = 0

    def answered(indices: list[int]) -> _Answered:
        nonlocal done
        begun = time.monotonic()
        output = generate(
            setup.model,
            tokenizer,
            [prompts[i] for i in indices],
            pruner,
            execution=execution,
            max_new_tokens=max(most[i] for i in indices),
            **({} if setup.answer_limit is None else {"stopping_criteria": stopping_at([most[i] for i in indices])}),
        )
        seconds, heads = time.monotonic() - begun, HeadMeans()
        heads.add(output.keep, output.signals, units)
        ratios = keep_ratio(output.keep).tolist() if output.keep else [1.0] * len(indices)
        counts = [min(n, most[i]) for i, n in zip(indices, output.lengths, strict=True)]
        answers = {
            i: Answer(e.id, text, setup.task.correct(e, text), ratio, tokens, e.difficulty, e.family)
            for i, e, text, ratio, tokens in zip(
                indices, (examples[i] for i in indices), output.texts, ratios, counts, strict=True
            )
        }
        done += len(indices) * processes.count()
        if progress:
            progress(min(done, len(examples)), len(examples))
        return _Answered(answers, heads, seconds, processes.rank())

    answers: dict[int, Answer] = {}
    heads, seconds = HeadMeans(), [0.0] * processes.count()
    for part in processes.shared_out(batches, answered):
        answers |= part.answers
        heads.add_all(part.heads)
        seconds[part.process] += part.seconds
    return Evaluation(tuple(answers[i] for i in range(len(examples))), max(seconds), heads.as_json())


def paired(dense: Evaluation, pruned: Evaluation) -> Difference:
    """Accuracy of `pruned` minus `dense` on the same prompts, with the exact McNemar p-value."""
    if [a.id for a in dense.answers] != [a.id for a in pruned.answers]:
        raise DataError("the two evaluations answered different examples; evaluate both on the same ones")
    ours, theirs = [a.correct for a in pruned.answers], [a.correct for a in dense.answers]
    difference = paired_difference(ours, theirs)
    return Difference(difference.diff, difference.ci95, mcnemar_exact(ours, theirs))


def follows_difficulty(pruned: Evaluation) -> Correlation | None:
    """Rank correlation of a problem's steps and its sparsity; None where every problem lost the same heads."""
    sparsity = [1 - answer.keep_ratio for answer in pruned.answers]
    steps = [answer.difficulty for answer in pruned.answers]
    if len(steps) < 3 or len(set(sparsity)) < 2 or len(set(steps)) < 2:
        return None
    correlation = spearman_ci(steps, sparsity)
    return Correlation(correlation.rho, correlation.ci95)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
