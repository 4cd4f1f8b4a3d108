"""Judge a pruned model beside the dense one on one data set, by everything that the data set can tell.

Where answers are generated, how close the pruned model stays to the dense one stands beside how many are right: it is
measured on the answers that the dense model wrote, and few tokens of KL can still cost many answers of long reasoning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from microglia.errors import ConfigError, DataError
from microglia.evaluation.batches import Progress as Done
from microglia.evaluation.choices import SCORINGS, score_choices
from microglia.evaluation.closeness import Closeness, closeness
from microglia.evaluation.likelihood import Pair, encode_pair
from microglia.evaluation.run import Evaluation, paired
from microglia.evaluation.setup import Setup
from microglia.evaluation.significance import clustered_ci, paired_difference, wilson_ci
from microglia.experiments.measure import Progress
from microglia.ledger import Ledger
from microglia.pruner import Pruner
from microglia.results import Difference, EvaluationResult, Figure, JudgementResult
from microglia.tasks.prompts import prompt_ids

WAYS = ("generation", *SCORINGS, "text")


@dataclass(frozen=True)
class Judged:
    """Figures of one data set, and the answers behind them: `pruned`, and `dense` where that answered too."""

    figures: tuple[Figure, ...]
    runs: dict[str, Evaluation] = field(default_factory=dict)


def judge(
    setup: Setup,
    pruner: Pruner,
    scoring: str | None = None,
    *,
    dense: bool = True,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> Judged:
    """All figures of the setup's examples. scoring: one of WAYS, None for the task's own.

    `text` feeds each example's answer as it is, or where there is none, what the dense model itself writes. ledger:
    keeps finished batches, its settings name the model. `progress(name, done, total)` is called after every batch.
    Raises ConfigError for an unknown scoring, and for texts without the dense model; DataError as the parts do.
    """
    scoring = scoring or setup.task.scoring
    if scoring not in WAYS:
        raise ConfigError(f"scoring={scoring!r} is unknown; choose one of {', '.join(WAYS)}")
    if scoring == "text" and not dense:
        raise ConfigError("scoring='text' compares with the dense model, so it cannot be left out; drop dense=False")
    if not setup.examples:
        raise DataError("there is no example to evaluate; give at least one, or a larger limit")
    if scoring == "generation":
        check_answers(setup)

    def update(part: str) -> Done | None:
        return partial(progress, f"{setup.task.name}, {part}") if progress else None

    given = scoring == "text" and holds_texts(setup)
    runs = dict[str, Evaluation]()
    for name, at in {"pruned": pruner, **({"dense": None} if dense else {})}.items():
        if scoring in SCORINGS:
            runs[name] = score_choices(setup, at, scoring, update(name), ledger)
        elif not given:
            runs[name] = setup.answers(at, update(name), ledger)
    judged = list[Figure]()
    if scoring != "text":
        judged += _accuracies(setup, runs)
    if dense and scoring not in SCORINGS:
        pairs = _given_pairs(setup) if given else _own_pairs(setup, runs["dense"])
        close = closeness(
            setup.model,
            pairs,
            pruner,
            execution=setup.execution,
            batch_size=setup.batch_size,
            ledger=ledger,
            progress=update("texts"),
        )
        judged += closeness_figures(setup.task.name, close)
    if not given and scoring not in SCORINGS:
        judged += _written(setup, runs)
    kept = [a.keep_ratio for a in runs["pruned"].answers] if runs else [c.keep_ratio for c in close]
    judged.append(_figure(setup, "keep_ratio", kept, None))
    return Judged(tuple(judged), runs)


def result_of(setup: Setup, judged: Judged, split: str, scoring: str | None) -> EvaluationResult | JudgementResult:
    """The typed result of one data set: an evaluation where something is right or wrong, else its figures alone."""
    scoring, task = scoring or setup.task.scoring, setup.task
    if scoring == "text":
        settings = {"split": split, "max_new_tokens": setup.max_new_tokens}
        return JudgementResult(figures=judged.figures, settings=settings)
    pruned, dense = judged.runs["pruned"], judged.runs.get("dense")
    return EvaluationResult(
        dataset=task.name,
        split=split,
        shots=task.shots,
        scoring=scoring,
        accuracy=pruned.accuracy,
        sparsity=pruned.sparsity,
        pruned=pruned.summary(),
        dense=dense.summary() if dense else None,
        paired=paired(dense, pruned) if dense else None,
        answers={name: run.rows() for name, run in judged.runs.items()},
        figures=judged.figures,
        max_new_tokens=setup.max_new_tokens if scoring == "generation" else None,
    )


def together(results: Mapping[str, EvaluationResult | JudgementResult]) -> JudgementResult:
    """Several data sets as one result, in their order."""
    return JudgementResult(
        figures=tuple(figure for result in results.values() for figure in result.figures),
        evaluations={name: one for name, one in results.items() if isinstance(one, EvaluationResult)},
        settings={name: one.settings for name, one in results.items() if isinstance(one, JudgementResult)},
    )


def closeness_figures(dataset: str, close: Sequence[Closeness]) -> list[Figure]:
    """KL, top-1 agreement and perplexity, per token over all texts; intervals resample prompts.

    The dense model stands at KL 0 and agreement 1 to itself. Raises DataError where pruned units predict no token.
    """
    close = [one for one in close if one.tokens]
    if not close:
        raise DataError("every text has a single token, which the dense prompt predicts; give longer texts")
    tokens = [one.tokens for one in close]
    total, nothing = sum(tokens), math.nan

    def per_token(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
        return sum(values) / total, clustered_ci(values, tokens)

    kl, kl_ci = per_token([one.kl for one in close])
    apart, apart_ci = per_token([one.tokens - one.agreed for one in close])
    losses = [sum(one.dense_loss for one in close) / total, sum(one.pruned_loss for one in close) / total]
    _, loss_ci = per_token([one.pruned_loss - one.dense_loss for one in close])
    before, after = map(math.exp, losses)
    # Of the ratio of perplexities, which the difference of losses decides; the dense perplexity is taken as it is.
    factors = tuple(before * (math.exp(end) - 1) for end in loss_ci)
    rows = {
        "kl": (0.0, kl, kl, kl_ci),
        "top1": (1.0, 1 - apart, -apart, (-apart_ci[1], -apart_ci[0])),
        "perplexity": (before, after, after - before, factors),
    }
    return [
        Figure(
            dataset=dataset,
            measure=measure,
            prompts=len(close),
            dense=dense,
            pruned=pruned,
            difference=Difference(diff, (ci[0], ci[1]), nothing),
        )
        for measure, (dense, pruned, diff, ci) in rows.items()
    ]


def exact_prefixes(dense: Evaluation, pruned: Evaluation) -> list[int]:
    """How many tokens each pruned answer shares with the dense one before the first that differs."""
    return [
        next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), min(map(len, both)))
        for a, b in zip(dense.answers, pruned.answers, strict=True)
        for both in [(a.tokens, b.tokens)]
    ]


def _accuracies(setup: Setup, runs: dict[str, Evaluation]) -> list[Figure]:
    pruned, dense = runs["pruned"], runs.get("dense")
    return [
        Figure(
            dataset=setup.task.name,
            measure="accuracy",
            prompts=len(pruned.answers),
            dense=dense.accuracy if dense else None,
            pruned=pruned.accuracy,
            difference=paired(dense, pruned) if dense else None,
        )
    ]


def _written(setup: Setup, runs: dict[str, Evaluation]) -> list[Figure]:
    """What generated answers tell beside whether they are right."""
    pruned, dense = runs["pruned"], runs.get("dense")
    cut = [not a.finished for a in pruned.answers]
    figures = [_figure(setup, "unfinished", cut, [not a.finished for a in dense.answers] if dense else None)]
    if dense is None:
        return figures
    prefixes, whole = exact_prefixes(dense, pruned), [len(a.tokens) for a in dense.answers]
    same = [a.tokens == b.tokens for a, b in zip(dense.answers, pruned.answers, strict=True)]
    share, ends = sum(same) / len(same), wilson_ci(sum(same), len(same))
    all_same = Figure(
        dataset=setup.task.name,
        measure="same",
        prompts=len(same),
        pruned=share,
        dense=1.0,
        difference=Difference(share - 1, (ends[0] - 1, ends[1] - 1), math.nan),
    )
    return [*figures, _figure(setup, "exact_prefix", prefixes, whole), all_same]


def _figure(setup: Setup, measure: str, pruned: Sequence[float], dense: Sequence[float] | None) -> Figure:
    """Means over prompts and their paired difference."""
    difference = None
    if dense is not None:
        paired_by_prompt = paired_difference(pruned, dense)
        difference = Difference(paired_by_prompt.diff, paired_by_prompt.ci95, math.nan)
    return Figure(
        dataset=setup.task.name,
        measure=measure,
        prompts=len(pruned),
        dense=None if dense is None else sum(dense) / len(dense),
        pruned=sum(pruned) / len(pruned),
        difference=difference,
    )


def check_answers(setup: Setup) -> None:
    """Raise ConfigError for a task on which nothing is right or wrong."""
    if setup.task.scoring == "text":
        raise ConfigError(
            f"task {setup.task.name} has no right answers to count; choose scoring='text', a promise with "
            "loss='agreement' or loss='kl', or another task"
        )


def holds_texts(setup: Setup) -> bool:
    """Whether the data hold texts to score; else the dense model writes them."""
    return setup.task.scoring == "text" and bool(setup.examples[0].answer)


def texts_of(setup: Setup, ledger: Ledger | None = None, progress: Progress | None = None) -> list[Pair]:
    """Token ids of the prompts and of the texts after them: those of the data, or greedy answers of the dense model."""
    if holds_texts(setup):
        return _given_pairs(setup)
    return _own_pairs(setup, setup.answers(None, partial(progress, "dense") if progress else None, ledger))


def _given_pairs(setup: Setup) -> list[Pair]:
    """Prompts and the texts that stand in the data."""
    prompts = zip(setup.prompts, setup.examples, strict=True)
    return [encode_pair(setup.tokenizer, prompt, example.answer) for prompt, example in prompts]


def _own_pairs(setup: Setup, dense: Evaluation) -> list[Pair]:
    """Prompts and what the dense model answered, token by token."""
    ids = prompt_ids(setup.tokenizer, setup.prompts)
    return [(prompt, list(answer.tokens)) for prompt, answer in zip(ids, dense.answers, strict=True)]
