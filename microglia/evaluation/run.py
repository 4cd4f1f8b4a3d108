"""Answer examples and judge the answers: accuracy, sparsity, output length and time from one and the same run."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from microglia import processes
from microglia.errors import DataError
from microglia.evaluation.answer_limit import limits, stopping_at
from microglia.evaluation.batches import Progress, by_batches
from microglia.evaluation.heads import HeadMeans
from microglia.evaluation.significance import mcnemar_exact, paired_difference, spearman_ci, wilson_ci
from microglia.execution import execution_for
from microglia.gate import keep_ratio
from microglia.generation import Generated, generate
from microglia.ledger import Ledger
from microglia.pruner import Pruner
from microglia.results import Correlation, Difference, Summary

if TYPE_CHECKING:
    from microglia.evaluation.setup import Setup


@dataclass(frozen=True)
class Answer:
    """One example's answer and what it cost: `new_tokens` without padding, `keep_ratio` 1.0 when dense.

    `choices` are the log-probabilities of the choices where the answer was chosen by likelihood. `finished`:
    a generated one ended by itself and not at the limit. `tokens`: those that were generated.
    """

    id: str
    text: str
    correct: bool
    keep_ratio: float
    new_tokens: int
    difficulty: int
    family: str
    choices: tuple[float, ...] = ()
    finished: bool | None = None
    tokens: tuple[int, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """What is not empty, without the tokens."""
        row = asdict(self)
        del row["tokens"]
        return {name: value for name, value in row.items() if value not in ((), None)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Answer":
        """What `to_json` or a ledger gave."""
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
        return cls(**given)


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
    def unfinished(self) -> float | None:
        """Share of the answers that were cut off at the limit, and are judged by what there is; None of choices."""
        finished = [a.finished for a in self.answers if a.finished is not None]
        return 1 - _mean(finished) if finished else None

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
            unfinished=self.unfinished,
            seconds=self.seconds,
            heads=self.heads,
            to_dense=None if dense is None else paired(dense, self),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per answer."""
        return [answer.to_json() for answer in self.answers]

    def to_json(self) -> dict[str, Any]:
        """For a ledger."""
        return {"answers": self.rows(), "seconds": self.seconds}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Evaluation":
        """What `to_json` gave."""
        return cls(tuple(Answer.from_json(answer) for answer in row["answers"]), row["seconds"])


def evaluate(
    setup: "Setup", pruner: Pruner | None = None, progress: Progress | None = None, ledger: Ledger | None = None
) -> Evaluation:
    """Greedy answers to the setup's examples in batches of similar length, dense without a pruner.

    `progress(done, total)` is called after every batch. Of several processes (torchrun) each answers a share of the
    batches, and all return the whole; `seconds` are then those of the slowest. ledger: keeps finished batches, so that
    an interrupted run goes on; its settings name the model. Raises DataError when there is no example.
    """
    examples, prompts = setup.examples, setup.prompts
    if not examples:
        raise DataError("there is no example to evaluate; give at least one, or a larger limit")
    most = limits(setup.tokenizer, examples, setup.answer_limit, setup.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (most[i], len(prompts[i])))
    batches = [order[start : start + setup.batch_size] for start in range(0, len(order), setup.batch_size)]
    execution = execution_for(setup.execution, setup.model)  # once: what it keeps serves all batches
    units = None if pruner is None else [site.unit for site in pruner.sites(setup.model)]

    def answered(rows: list[int]) -> dict[str, Any]:
        begun = time.monotonic()
        output = generate(
            setup.model,
            setup.tokenizer,
            [prompts[i] for i in rows],
            pruner,
            execution=execution,
            max_new_tokens=max(most[i] for i in rows),
            **({} if setup.answer_limit is None else {"stopping_criteria": stopping_at([most[i] for i in rows])}),
        )
        seconds, heads = time.monotonic() - begun, HeadMeans()
        heads.add(output.keep, output.signals, units)
        ratios = keep_ratio(output.keep).tolist() if output.keep else [1.0] * len(rows)
        answers = [_answer(setup, i, output, row, ratios[row], most[i]) for row, i in enumerate(rows)]
        return {"answers": [asdict(answer) for answer in answers], "heads": heads.to_json(), "seconds": seconds}

    if ledger is not None:
        who = None if pruner is None or not execution.prunes else pruner.fingerprint()
        ledger = ledger.within(**setup.identity, pruner=who, part="answers")
    answers: dict[int, Answer] = {}
    heads, seconds = HeadMeans(), [0.0] * processes.count()
    parts = by_batches(batches, answered, ledger, progress)
    for index, (rows, part) in enumerate(zip(batches, parts, strict=True)):
        answers |= zip(rows, map(Answer.from_json, part["answers"]), strict=True)
        heads.add_json(part["heads"])
        seconds[index % len(seconds)] += part["seconds"]
    return Evaluation(tuple(answers[i] for i in range(len(examples))), max(seconds), heads.as_json())


def _answer(setup: "Setup", index: int, output: Generated, row: int, kept: float, most: int) -> Answer:
    """One row of a batch as the answer to the example of this index."""
    example, text, count = setup.examples[index], output.texts[row], min(output.lengths[row], most)
    return Answer(
        example.id,
        text,
        setup.task.correct(example, text),
        kept,
        count,
        example.difficulty,
        example.family,
        finished=output.finished[row] and count == output.lengths[row],
        tokens=tuple(output.tokens[row, :count].tolist()),
    )


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
