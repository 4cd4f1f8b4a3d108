"""Read prompts and write nothing: what a pruner measures of them and decides, from one dense pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length, input_device, token_rows
from microglia.attach import attached
from microglia.errors import DataError
from microglia.passes import padded, read_prompt
from microglia.pruner import Pruner
from microglia.settings import pad_token
from microglia.tasks.prompts import check_characters, prompt_ids


@dataclass(frozen=True)
class Reading:
    """Of N prompts, per site: features (N, F), logits and keep (N, U). cache: the prompts' dense one, where kept."""

    features: list[Tensor]
    logits: list[Tensor]
    keep: list[Tensor]
    cache: Any = None

    def on_cpu(self) -> "Reading":
        """Without the cache, in float32 on the CPU."""
        parts = ([x.detach().float().cpu() for x in part] for part in (self.features, self.logits, self.keep))
        return Reading(*parts)


@torch.no_grad()
def read(lm: nn.Module, ids: Tensor, mask: Tensor, pruner: Pruner) -> Reading:
    """Read one batch of prompts (B, T); the model is as before."""
    with attached(lm, pruner, "dense") as trace:
        cache = read_prompt(lm, ids, mask).past_key_values
    return Reading(trace.features, trace.logits, trace.keep, cache)


def read_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pruner: Pruner,
    *,
    batch_size: int = 32,
) -> Reading:
    """Read complete prompts in batches; everything on the CPU (its logits make a budget)."""
    lm = causal_lm(model)
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = encode_prompts(lm, tokenizer, prompts[start : start + batch_size], 0)
        parts.append(read(lm, batch["input_ids"], batch["attention_mask"], pruner).on_cpu())
    return joined(parts)


def joined(parts: Sequence[Reading]) -> Reading:
    """Several readings as one of all their prompts."""

    def together(name: str) -> list[Tensor]:
        return [torch.cat(site) for site in zip(*(getattr(part, name) for part in parts), strict=True)]

    return Reading(together("features"), together("logits"), together("keep"))


def encode_prompts(
    lm: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> dict[str, Tensor]:
    """Prompts → left-padded input_ids and attention_mask (B, T) on the model's device; nothing is cut off.

    Raises DataError for no prompt, an empty one, or one that the context does not hold with its answer.
    """
    if not prompts:
        raise DataError("no prompt was given; give at least one")
    if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
        raise DataError(f"prompt {empty[0]} of {len(prompts)} is empty; give every prompt some text")
    for prompt in prompts:
        check_characters(prompt)
    rows = prompt_ids(tokenizer, prompts)
    longest, context = max(map(len, rows)), context_length(lm)
    if context is not None and longest + max_new_tokens > context:
        raise DataError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but the model's "
            f"context is {context}; shorten the prompt or lower max_new_tokens"
        )
    if beyond := [token for row in rows for token in row if token >= token_rows(lm)]:
        raise DataError(
            f"the tokenizer gives token {beyond[0]}, but the model's embedding has {token_rows(lm)} rows; give the "
            "tokenizer of this model, or resize its embedding"
        )
    ids, mask = padded(rows, pad_token(lm, tokenizer), left=True)
    device = input_device(lm)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
