"""Forward passes over prompts with given answers, made as inference makes them: the prompt dense, the answer pruned.

Training, scoring and criteria share them: examples become batches with prompts padded on the left and answers on the
right, never mixed; the prompt fills a cache, and the answer continues it.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import headless
from microglia.attach import Trace, attached
from microglia.errors import ConfigError, DataError
from microglia.execution import Decision, Execution, Masked
from microglia.pruner import Pruner
from microglia.tasks.base import Example
from microglia.tasks.prompts import example_prompt, prompt_ids, worked_answers

Row = dict[str, list[int]]  # token ids of a `prompt` and of its `answer`


@dataclass(frozen=True)
class Batch:
    """`prompt` (B, P) and `answer` (B, N) token ids with their masks; answers end with the end-of-text token."""

    prompt: Tensor
    prompt_mask: Tensor
    answer: Tensor
    answer_mask: Tensor

    @property
    def labels(self) -> Tensor:
        """Answer tokens, -100 at padding, (B, N)."""
        return self.answer.masked_fill(self.answer_mask == 0, -100)

    @property
    def fed_mask(self) -> Tensor:
        """(B, P + N - 1), true at what the model reads: the last token of an answer predicts nothing."""
        return torch.cat([self.prompt_mask, self.answer_mask[:, :-1]], 1)

    def rows(self, rows: Tensor) -> "Batch":
        """The batch of these rows, no wider than their longest answer."""
        width = int(self.answer_mask[rows].sum(1).max())
        answer, mask = self.answer[rows, :width], self.answer_mask[rows, :width]
        return Batch(self.prompt[rows], self.prompt_mask[rows], answer, mask)


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: str, max_length: int | None
) -> list[Row]:
    """Token ids of prompt and answer per example. Examples that do not fit are an error."""
    prompts = prompt_ids(tokenizer, [example_prompt(tokenizer, e, template) for e in examples])
    answers = worked_answers(tokenizer, examples)
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        length = len(prompt) + len(answer)
        if max_length is not None and length > max_length:
            raise DataError(
                f"example {example.id} has {length} tokens with its answer, but the model's context is {max_length}; "
                "leave it out"
            )
    return [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows of `prompt` and `answer` ids → one Batch as a dict of tensors (what a Trainer moves to the device)."""
    prompt, prompt_mask = padded([row["prompt"] for row in rows], left=True)
    answer, answer_mask = padded([row["answer"] for row in rows], left=False)
    return {"prompt": prompt, "prompt_mask": prompt_mask, "answer": answer, "answer_mask": answer_mask}


def batch_of(rows: Sequence[dict[str, list[int]]], device: torch.device) -> Batch:
    """Rows of `prompt` and `answer` ids as a Batch on a device."""
    return Batch(**{name: x.to(device) for name, x in collate(rows).items()})


def padded(rows: Sequence[list[int]], pad: int = 0, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T); what stands at padding is never attended to."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) that count tokens and not padding, as a model's own `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def read_prompt(lm: nn.Module, ids: Tensor, mask: Tensor, *, use_cache: bool = True, **options: Any) -> Any:
    """The model's output for prompts (B, T): the last position's logits (B, 1, V) and the cache."""
    return lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=use_cache,
        logits_to_keep=1,
        **options,
    )


def write_answer(lm: nn.Module, batch: Batch, first: Any) -> Tensor:
    """Logits (B, N, V) that predict the answer's tokens, from the cache of `first`, what reading the prompts gave."""
    if batch.answer.shape[1] == 1:  # predicted by the prompt alone
        logits: Tensor = first.logits
        return logits
    output = lm(
        input_ids=batch.answer[:, :-1],
        attention_mask=batch.fed_mask,
        position_ids=positions(batch.fed_mask)[:, batch.prompt.shape[1] :],
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    return torch.cat([first.logits, output.logits], 1)


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A copy of a prompt's cache with these of its rows, in this order; what continues it leaves the cache alone."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(rows)
    return part


def answer_states(lm: nn.Module, batch: Batch, cache: Any) -> Tensor:
    """Final states (B, N - 1, hidden) that predict all of an answer but its first token; `cache` is used up."""
    with headless(lm) as states:
        lm(
            input_ids=batch.answer[:, :-1],
            attention_mask=batch.fed_mask,
            position_ids=positions(batch.fed_mask)[:, batch.prompt.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
    return states[-1]


def answer_logits(
    lm: nn.Module,
    batch: Batch,
    pruner: Pruner | None,
    execution: str | Execution = "masked",
    *,
    whole: ExitStack | None = None,
) -> tuple[Tensor, Trace]:
    """Logits (B, N, V) that predict the answer's tokens, and the trace of the decision (empty without a pruner).

    In two passes: the prompt fills a cache, the answer continues it, pruned. The prompt pass needs no gradient unless
    the model itself is trained. With `whole`, prompt and answer go through one pass with gates on answer positions
    instead: the same numbers at about twice the cost, for gradient checkpointing, which cannot use a cache and runs the
    layers again in the backward pass: the gates stay until the caller closes `whole`.
    """
    if pruner is None:
        return _one_pass(lm, batch), Trace()
    if whole is not None:
        with attached(lm, pruner, "dense") as trace, torch.no_grad():
            read_prompt(lm, batch.prompt, batch.prompt_mask, use_cache=False)
        where = torch.cat([torch.zeros_like(batch.prompt_mask), batch.answer_mask[:, :-1]], 1).bool()
        if pruner.recovery is not None:
            raise ConfigError("a recovery is trained without gradient checkpointing; change one of them")
        whole.enter_context(Masked(where).apply(pruner.sites(lm), Decision(trace.keep)))
        return _one_pass(lm, batch), trace
    model_trains = any(p.requires_grad for p in lm.parameters())
    with attached(lm, pruner, execution) as trace:
        with torch.set_grad_enabled(model_trains and torch.is_grad_enabled()):
            first = read_prompt(lm, batch.prompt, batch.prompt_mask)
        return write_answer(lm, batch, first), trace


def _one_pass(lm: nn.Module, batch: Batch) -> Tensor:
    mask, ids = batch.fed_mask, torch.cat([batch.prompt, batch.answer[:, :-1]], 1)
    length = batch.answer.shape[1]
    output = lm(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=length
    )
    logits: Tensor = output.logits
    return logits
