"""Judge multiple choice by likelihood: the choice whose text is the likeliest answer to the question."""

import time

from microglia.errors import ConfigError, DataError
from microglia.evaluation.batches import Progress
from microglia.evaluation.likelihood import encode_pair, likelihoods
from microglia.evaluation.run import Answer, Evaluation
from microglia.evaluation.setup import Setup
from microglia.ledger import Ledger
from microglia.pruner import Pruner
from microglia.tasks.prompts import choice_prompt, generated_answer_prefix

# How a choice's log-probability is made comparable: not at all (lm-evaluation-harness: acc), or divided by the number
# of its characters, which longer texts need (acc_norm).
SCORINGS = ("likelihood", "likelihood-per-character")


def score_choices(
    setup: Setup,
    pruner: Pruner | None = None,
    scoring: str = "likelihood",
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> Evaluation:
    """Choose the likeliest of each example's choices, dense without a pruner; nothing is generated.

    The question stands alone in the prompt and is read dense; the choices' texts are scored with the kept units. Every
    answer holds its text, its length in tokens and the log-probabilities of all choices. `progress(done, total)` counts
    choices; the ledger keeps finished batches. Raises DataError when there is no example, ConfigError for an example
    without choices.
    """
    if scoring not in SCORINGS:
        raise ConfigError(f"scoring={scoring!r} is unknown; choose generation, {' or '.join(SCORINGS)}")
    examples, tokenizer = setup.examples, setup.tokenizer
    if not examples:
        raise DataError("there is no example to evaluate; give at least one, or a larger limit")
    begun, prefix = time.monotonic(), generated_answer_prefix(tokenizer)
    prompts = [choice_prompt(tokenizer, example, setup.task.template) for example in examples]
    chosen_from = [example.choices for example in examples if example.choices is not None]
    pairs = [
        encode_pair(tokenizer, prompt, prefix + text)
        for prompt, choices in zip(prompts, chosen_from, strict=True)
        for text in choices.texts
    ]
    scored = likelihoods(
        setup.model,
        pairs,
        pruner,
        execution=setup.execution,
        batch_size=setup.batch_size,
        progress=progress,
        ledger=ledger and ledger.within(**setup.identity, pruner=None if pruner is None else pruner.fingerprint()),
    )
    answers, start = [], 0
    for example, choices in zip(examples, chosen_from, strict=True):
        choice_scores = scored[start : start + len(choices.texts)]
        lengths = [len(text) if scoring == "likelihood-per-character" else 1 for text in choices.texts]
        scores = [one.log_probability / length for one, length in zip(choice_scores, lengths, strict=True)]
        chosen = scores.index(max(scores))
        answers.append(
            Answer(
                example.id,
                choices.texts[chosen],
                chosen == choices.gold,
                choice_scores[chosen].keep_ratio,
                len(pairs[start + chosen][1]),
                example.difficulty,
                example.family,
                tuple(one.log_probability for one in choice_scores),
            )
        )
        start += len(choice_scores)
    return Evaluation(tuple(answers), time.monotonic() - begun)
