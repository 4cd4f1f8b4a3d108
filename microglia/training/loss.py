"""The parts of the loss: `task + α · mean(keep) + β · H_b(keep)`, or steered to a keep ratio.

The original project prints `- β · entropy` and says that the term prevents gates from getting stuck at 0.5. Minimising
that would pull them *to* 0.5; we do what the words say and minimise `+ β · H_b`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from microglia.gate import keep_ratio


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of answer tokens. `logits` (B, N, V) predict `labels` (B, N), -100 where nothing counts."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def mean_keep(keep: Sequence[Tensor]) -> Tensor:
    """Keeps (B, H) of all sites → their mean over prompts and heads."""
    return keep_ratio(keep).mean()


def gate_entropy(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean binary entropy, in nats, of `sigmoid(logits / temperature)` over prompts, sites and heads."""
    flat = torch.cat([x.flatten() for x in logits]) / temperature
    return (torch.sigmoid(flat) * F.softplus(-flat) + torch.sigmoid(-flat) * F.softplus(flat)).mean()


def distillation_loss(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """KL(dense ‖ pruned) per answer token (Hinton et al. 2015, at temperature 1). Both logits (B, N, V)."""
    counted = labels != -100
    pruned, teacher = logits[counted].float().log_softmax(-1), dense[counted].float().log_softmax(-1)
    return F.kl_div(pruned, teacher, log_target=True, reduction="batchmean")
