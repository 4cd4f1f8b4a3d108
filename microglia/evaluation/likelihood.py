"""How likely a given text is after a prompt: the prompt read with every head, the text scored with the kept ones.

As in generation, the last position of the prompt predicts the first token of the text, and the prompt is read dense: a
text of one token is therefore scored by the dense model alone, whatever the policy prunes.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia import processes
from microglia.attach import attached
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate, keep_ratio
from microglia.generation import PATHS, positions
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import causal_lm, input_device
from microglia.tasks.prompts import uses_chat_template

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
    special = not uses_chat_template(tokenizer)
    ids, whole = (tokenizer(part, add_special_tokens=special)["input_ids"] for part in (prompt, prompt + text))
    if not ids or len(whole) <= len(ids):
        raise DataError(
            f"the text {text!r} after a prompt of {len(ids)} tokens has no token to score; give longer ones"
        )
    return list(ids), list(whole[len(ids) :])


@torch.inference_mode()
def likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    policy: Policy | None = None,
    *,
    pad_token_id: int | None = 0,
    gate: Gate | None = None,
    look: Look | None = None,
    fill: str = "zero",
    scope: str = "answer",
    path: str = "compact",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every pair's text after its prompt, in their order; dense when `policy` is None.

    Raises DataError for a pair that exceeds the model's context. `progress(done, total)` is called after every batch.
    """
    if path not in PATHS:
        raise ConfigError(f"path={path!r} is unknown; choose {' or '.join(PATHS)}")
    lm: Any = causal_lm(model)
    room = getattr(lm.config, "max_position_embeddings", None)
    longest = max((len(prompt) + len(text) - 1 for prompt, text in pairs), default=0)
    if room is not None and longest > room:
        raise DataError(
            f"a prompt and its text have {longest} tokens, but the model's context is {room}; shorten the prompt"
        )
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = 0

    def scored(rows: list[int]) -> dict[int, Likelihood]:
        nonlocal done
        prompt, prompt_mask = _padded([pairs[i][0] for i in rows], pad_token_id or 0, left=True)
        text, text_mask = _padded([pairs[i][1] for i in rows], pad_token_id or 0, left=False)
        batch = [x.to(input_device(lm)) for x in (prompt, prompt_mask, text, text_mask)]
        context = (
            attached(lm, policy, gate=gate, look=look, fill=fill, scope=scope, pruning=PATHS[path])
            if policy is not None
            else nullcontext()
        )
        with context as trace:
            logits = _text_logits(lm, *batch)
        ratios = keep_ratio(trace.keep).tolist() if trace else [1.0] * len(rows)
        found = {}
        for row, i in enumerate(rows):
            ids = batch[2][row, : len(pairs[i][1])]
            scores = logits[row, : len(ids)].float().log_softmax(-1)  # (N, V)
            total = scores.gather(1, ids[:, None]).sum().item()
            found[i] = Likelihood(total, bool((scores.argmax(-1) == ids).all()), ratios[row])
        done += len(rows) * processes.count()
        if progress:
            progress(min(done, len(pairs)), len(pairs))
        return found

    processes.join()
    by_pair = {i: one for found in processes.shared_out(batches, scored) for i, one in found.items()}
    return [by_pair[i] for i in range(len(pairs))]


def _text_logits(lm: Any, prompt: Tensor, prompt_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Logits (B, N, V) that predict the text (B, N) after the prompts (B, T), in two passes."""
    first = lm(
        input_ids=prompt,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    if text.shape[1] == 1:
        return first.logits
    mask = torch.cat([prompt_mask, text_mask[:, :-1]], 1)
    rest = lm(
        input_ids=text[:, :-1],
        attention_mask=mask,
        position_ids=positions(mask)[:, prompt.shape[1] :],
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    return torch.cat([first.logits, rest.logits], 1)


def _padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T)."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask
