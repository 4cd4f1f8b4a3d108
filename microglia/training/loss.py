"""The parts of the loss: `task + α · mean(keep) + β · H_b(keep)`, or steered to a keep ratio.

Task, distillation and price are one number per answer, and all are averaged over answers with the same weights: by
their tokens, as time is spent, or alike.

The original project prints `- β · entropy` and says that the term prevents gates from getting stuck at 0.5. Minimising
that would pull them *to* 0.5; we do what the words say and minimise `+ β · H_b`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.anatomy import logits_of

# At once in the output head: on a CPU 25 MB of logits with a vocabulary of 50,000; a GPU has memory and slow launches.
POSITIONS = {"cpu": 128, "cuda": 1024}


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


def token_losses(
    lm: nn.Module, states: Tensor, labels: Tensor, dense: Tensor | None, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of final states (M, hidden) that predict labels (M,): the loss of each, its cross entropy and its KL, (M,).

    The loss is `(1 - kl_weight) · cross entropy + kl_weight · KL(dense ‖ pruned)`; gradients reach the states through
    it alone. dense: the final states of the dense model (M, hidden); None where no KL is asked for, which is then 0.
    The output head works on a few positions at a time, so that logits never exist for all of them: with a vocabulary
    of 50,000 they would be the largest tensors by far.
    """
    loss, task, kl = _Chunked.apply(states, labels, dense, lm, kl_weight)
    return loss, task, kl


class _Chunked(torch.autograd.Function):
    """As in Liger Kernel's fused linear losses: the states' gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, labels: Tensor, dense: Tensor | None, lm: nn.Module, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        most = POSITIONS.get(states.device.type, POSITIONS["cuda"])
        for start in range(0, len(states), most):
            here = slice(start, start + most)
            teacher = None if dense is None else logits_of(lm, dense[here]).float().log_softmax(-1)
            with torch.set_grad_enabled(wanted):
                x = states[here].detach().requires_grad_(wanted)
                predicted = logits_of(lm, x).float().log_softmax(-1)
                task = -predicted.gather(1, labels[here, None])[:, 0]
                if teacher is None:
                    loss, kl = (1 - kl_weight) * task, torch.zeros_like(task)
                else:
                    kl = (teacher.exp() * (teacher - predicted)).sum(-1)
                    loss = kl if kl_weight == 1 else (1 - kl_weight) * task + kl_weight * kl
                if wanted:
                    gradients += torch.autograd.grad(loss.sum(), x)
            losses.append(torch.stack([loss.detach(), task.detach(), kl.detach()]))
        parts = torch.cat(losses, 1) if losses else states.new_zeros(3, 0, dtype=torch.float32)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(states))
        ctx.mark_non_differentiable(task := parts[1], kl := parts[2])
        return parts[0].clone(), task, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return outer[0][:, None].to(own) * own, None, None, None, None
