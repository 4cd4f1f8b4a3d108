"""The parts of the loss: `task + α · mean(keep) + β · H_b(keep)`, or steered to a keep ratio.

Task, distillation and price are one number per answer, and all are averaged over answers with the same weights: by
their tokens, as time is spent, or alike.

The original project prints `- β · entropy` and says that the term prevents gates from getting stuck at 0.5. Minimising
that would pull them *to* 0.5; we do what the words say and minimise `+ β · H_b`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per token of each answer, (B,). `logits` (B, N, V) predict `labels` (B, N), -100 at padding."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(labels).sum(1) / answer_tokens(labels)


def answer_tokens(labels: Tensor) -> Tensor:
    """The tokens of each answer (B,) from labels (B, N), -100 at padding."""
    return (labels != -100).sum(1)


def gate_entropy(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean binary entropy, in nats, of `sigmoid(logits / temperature)` over prompts, sites and heads."""
    flat = torch.cat([x.flatten() for x in logits]) / temperature
    return (torch.sigmoid(flat) * F.softplus(-flat) + torch.sigmoid(-flat) * F.softplus(flat)).mean()


def divergences(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """KL(dense ‖ pruned) per token of each answer, (B,) (Hinton et al. 2015, at temperature 1). Logits (B, N, V)."""
    counted = labels != -100
    pruned, teacher = logits[counted].float().log_softmax(-1), dense[counted].float().log_softmax(-1)
    per_token = F.kl_div(pruned, teacher, log_target=True, reduction="none").sum(-1)
    return per_token.new_zeros(labels.shape).masked_scatter(counted, per_token).sum(1) / answer_tokens(labels)
