"""How likely a given text is after a prompt: the prompt read with every head, the text scored with the kept ones.

As in generation, the last position of the prompt predicts the first token of the text, and the prompt is read dense: a
text of one token is therefore scored by the dense model alone, whatever the policy prunes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length, input_device
from microglia.errors import ConfigError, DataError
from microglia.evaluation.batches import Progress, by_batches
from microglia.execution import EXECUTIONS, Execution, execution_for
from microglia.ledger import Ledger
from microglia.passes import answer_logits, batch_of, read_prompt, write_answer
from microglia.pruner import Pruner
from microglia.registry import listed
from microglia.tasks.prompts import prompt_ids
from microglia.tasks.used import fingerprint_of

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of the text after it


@dataclass(frozen=True)
class Likelihood:
    """Sum of the text's log-probabilities, whether greedy decoding would have said it, and the prompt's keep ratio."""

    log_probability: float
    greedy: bool
    keep_ratio: float


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Pair:
    """Prompt and text tokenised as one and cut where the prompt alone ends (as lm-evaluation-harness does).

    Raises DataError when the prompt or the text has no token of its own.
    """
    ids, whole = prompt_ids(tokenizer, [prompt, type(prompt)(prompt + text)])
    if not ids or len(whole) <= len(ids):
        raise DataError(
            f"the text {text!r} after a prompt of {len(ids)} tokens has no token to score; give longer ones"
        )
    return ids, whole[len(ids) :]


@torch.inference_mode()
def likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    pruner: Pruner | None = None,
    *,
    execution: str | Execution = "compact",
    batch_size: int = 32,
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> list[Likelihood]:
    """The likelihood of every pair's text after its prompt, in their order; dense without a pruner.

    Raises DataError for a pair that exceeds the model's context, ConfigError for an execution that continues a prompt
    token by token only. `progress(done, total)` is called after every batch. ledger: keeps finished batches; its
    settings name model, pruner and execution.
    """
    lm, context = causal_lm(model), context_length(model)
    execution = execution_for(execution, lm)
    if not execution.scores:
        names = [name for name, kind in EXECUTIONS.items() if kind.scores]
        raise ConfigError(f"execution={execution.name!r} scores no texts; choose {listed(names)}")
    pruner = pruner if execution.prunes else None
    longest = max((len(prompt) + len(text) - 1 for prompt, text in pairs), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a prompt and its text have {longest} tokens, but the model's context is {context}; shorten the prompt"
        )
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def scored(rows: list[int]) -> dict[str, Any]:
        batch = batch_of([{"prompt": pairs[i][0], "answer": pairs[i][1]} for i in rows], input_device(lm))
        if pruner is None:
            logits = write_answer(lm, batch, read_prompt(lm, batch.prompt, batch.prompt_mask))
            ratios = [1.0] * len(rows)
        else:
            logits, trace = answer_logits(lm, batch, pruner, execution)
            ratios = trace.keep_ratio.tolist()
        found = []
        for row, i in enumerate(rows):
            ids = batch.answer[row, : len(pairs[i][1])]
            scores = logits[row, : len(ids)].float().log_softmax(-1)  # (N, V)
            total = scores.gather(1, ids[:, None]).sum().item()
            found.append([total, bool((scores.argmax(-1) == ids).all()), ratios[row]])
        return {"likelihoods": found}

    if ledger is not None:
        ledger = ledger.within(texts=fingerprint_of(pairs), part="likelihoods")
    by_pair = dict[int, Likelihood]()
    for rows, part in zip(batches, by_batches(batches, scored, ledger, progress), strict=True):
        by_pair |= zip(rows, (Likelihood(*one) for one in part["likelihoods"]), strict=True)
    return [by_pair[i] for i in range(len(pairs))]
