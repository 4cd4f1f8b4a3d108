"""Generate answers for prompts on the dense, masked or compacted path."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.attach import attached, gated
from microglia.compact import compacted
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import causal_lm
from microglia.tasks.prompts import check_characters, uses_chat_template

PATHS = {"masked": gated, "compact": compacted}


@dataclass(frozen=True)
class Generated:
    """New tokens (B, N), their texts, and the keep (B, H) of every site, empty on the dense path."""

    tokens: Tensor
    texts: list[str]
    keep: list[Tensor]

    def lengths(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """New tokens per row, up to and with the end-of-text token, without the padding after it."""
        ended = (self.tokens == tokenizer.eos_token_id).long().cumsum(1)
        before = (ended == 0).sum(1)
        return (before + (ended > 0).any(1)).tolist()


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy | None = None,
    *,
    gate: Gate | None = None,
    look: Look | None = None,
    fill: str = "zero",
    scope: str = "answer",
    path: str = "compact",
    max_new_tokens: int = 256,
    **options: Any,
) -> Generated:
    """Read `prompts` as one batch with every head; write the answers with the heads that `policy` keeps for each.

    Without a policy the model stays dense. `path` is `compact` (heads are gone) or `masked` (heads are multiplied by
    zero; the same tokens, no time saved). `options` go to the model's own `generate` (sampling, streamer, stopping,
    beams); greedy by default. Raises DataError for an empty or too long prompt.
    """
    if path not in PATHS:
        raise ConfigError(f"path={path!r} is unknown; choose {' or '.join(PATHS)}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if policy is not None and options.get(name):
            raise ConfigError(
                f"{name} reads the prompt in parts or with guesses, so nothing could be decided on it; leave it out"
            )
    if policy is not None and options.get("use_cache") is False:
        raise ConfigError(
            "use_cache=False reads the prompt again for every token, so nothing is ever pruned; leave it out"
        )
    lm: Any = causal_lm(model)
    batch = encode_prompts(lm, tokenizer, prompts, max_new_tokens)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    context = (
        attached(lm, policy, gate=gate, look=look, fill=fill, scope=scope, pruning=PATHS[path])
        if policy is not None
        else nullcontext()
    )
    with context as trace:
        output = lm.generate(**batch, max_new_tokens=max_new_tokens, **options)
    tokens = getattr(output, "sequences", output)[:, batch["input_ids"].shape[1] :]
    return Generated(tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True), trace.keep if trace else [])


def encode_prompts(
    lm: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> dict[str, Tensor]:
    """Prompts → left-padded input_ids and attention_mask (B, T) on the model's device; nothing is cut off."""
    if not prompts:
        raise DataError("no prompt was given; give at least one")
    if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
        raise DataError(f"prompt {empty[0]} of {len(prompts)} is empty; give every prompt some text")
    for prompt in prompts:
        check_characters(prompt)
    tokenizer.padding_side = "left"
    special = not uses_chat_template(tokenizer)  # a chat template writes its own
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=special)
    longest, room = batch["input_ids"].shape[1], getattr(lm.config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise DataError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but the model's "
            f"context is {room}; shorten the prompt or lower max_new_tokens"
        )
    # Weights that accelerate holds elsewhere are on meta; it moves the ids itself.
    device = lm.device if lm.device.type != "meta" else "cpu"
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def prompt_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy,
    *,
    look: Look | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """What `policy` says of each of N prompts, nothing generated: logits (N, H) per site, on the CPU (for a dial)."""
    lm: Any = causal_lm(model)
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = encode_prompts(lm, tokenizer, prompts[start : start + batch_size], 0)
        with attached(lm, policy, look=look) as trace:
            lm(**batch, position_ids=positions(batch["attention_mask"]), use_cache=True, logits_to_keep=1)
        parts.append([x.float().cpu() for x in trace.logits])
    return [torch.cat(site) for site in zip(*parts, strict=True)]


def positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) that count tokens and not padding, as a model's own `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
