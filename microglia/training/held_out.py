"""The loss of worked answers under hard gates, per example: what a pruning costs before it costs a right answer."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import causal_lm, input_device
from microglia.tasks.base import Example
from microglia.training.data import Batch, Collator, encode
from microglia.training.loss import task_loss
from microglia.training.passes import answer_logits


@torch.no_grad()
def answer_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    policy: Policy | None,
    *,
    template: str,
    gate: Gate | None = None,
    look: Look | None = None,
    fill: str = "zero",
    scope: str = "answer",
    batch_size: int = 32,
) -> list[float]:
    """Mean cross entropy per answer token, in nats, of each example, dense when `policy` is None.

    Made as inference makes it: prompts are read with every head, answers with those that `policy` keeps.
    """
    lm = causal_lm(model)
    rows = list(encode(tokenizer, examples, template, getattr(lm.config, "max_position_embeddings", None)))
    collate = Collator(tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0)
    losses: list[float] = []
    for start in range(0, len(rows), batch_size):
        tensors = collate(rows[start : start + batch_size])
        batch = Batch(**{name: x.to(input_device(lm)) for name, x in tensors.items()})
        logits, _ = answer_logits(lm, batch, policy, gate=gate or Gate(), look=look or Look(), fill=fill, scope=scope)
        losses += [float(task_loss(x[None], y[None])) for x, y in zip(logits, batch.labels, strict=True)]
    return losses
