"""A batch's answers, written with the units that were decided on for its prompts: the loss and its gradients.

The prompts are read once, together and without gradients. Then answers of like lengths go together, few enough tokens
at a time that their activations fit, each group forward and backward before the next; what reaches the decisions and
the recovery is collected. A batch can thereby be large and mix short and long, easy and hard, at no cost in padding or
memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import headless
from microglia.attach import Trace, attached
from microglia.execution import Decision, Masked
from microglia.passes import Batch, answer_states, read_prompt, rows_of
from microglia.pruner import Pruner
from microglia.training.loss import token_losses
from microglia.units import Site

# Tokens of answers at once: some 3 GB of activations in float32 on SmolLM2; a GPU has more memory and slow launches.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Written:
    """Of a batch's answers: the weighted mean loss, differentiable; cross entropy and KL per token of each, (B,)."""

    loss: Tensor
    task: Tensor
    kl: Tensor
    trace: Trace


def written(lm: nn.Module, batch: Batch, pruner: Pruner, weights: Tensor, kl_weight: float) -> Written:
    """Read the prompts, decide, write the answers.

    weights: (B,), what each answer's mean loss per token counts for, with a sum of 1. kl_weight: see `token_losses`;
    the dense model's states come from the same prompts' cache. Decisions and recovery get gradients where they want
    any.
    """
    with torch.no_grad(), attached(lm, pruner, "dense") as trace, headless(lm) as first:
        cache = read_prompt(lm, batch.prompt, batch.prompt_mask).past_key_values
    recovery = [] if pruner.recovery is None else [p for p in pruner.recovery.parameters() if p.requires_grad]
    work = _Work(lm, batch, pruner, weights, kl_weight, trace, pruner.sites(lm), cache, first[-1][:, -1])
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (*trace.keep, *recovery))
    loss, task, kl = _Summed.apply(work, len(trace.keep), wanted, *trace.keep, *recovery)
    return Written(loss, task, kl, trace)


@dataclass(frozen=True)
class _Work:
    """What the groups of a batch share. first: (B, hidden), final states that predict the answers' first tokens."""

    lm: nn.Module
    batch: Batch
    pruner: Pruner
    weights: Tensor
    kl_weight: float
    trace: Trace
    sites: Sequence[Site]
    cache: Any
    first: Tensor

    def groups(self) -> list[Tensor]:
        """Rows of like lengths, longest first, so that what is too large for the memory is seen at once."""
        lengths = self.batch.answer_mask.sum(1)
        most = TOKENS_AT_ONCE.get(lengths.device.type, TOKENS_AT_ONCE["cuda"])
        groups: list[list[int]] = []
        for row in lengths.argsort(descending=True, stable=True).tolist():
            if not groups or (len(groups[-1]) + 1) * int(lengths[groups[-1][0]]) > most:
                groups.append([])
            groups[-1].append(row)
        return [torch.tensor(rows, device=lengths.device) for rows in groups]

    def group(self, rows: Tensor, keep: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross entropy and KL per token of each of these answers, (rows,); keep (B, U) per site."""
        batch, first = self.batch.rows(rows), self.first[rows]
        counted = batch.answer_mask.bool()
        dense = pruned = first[:, None]
        if batch.answer.shape[1] > 1:
            if self.kl_weight:
                with torch.no_grad():
                    dense = torch.cat([dense, answer_states(self.lm, batch, rows_of(self.cache, rows))], 1)
            with self._pruned(rows, keep):
                pruned = torch.cat([pruned, answer_states(self.lm, batch, rows_of(self.cache, rows))], 1)
        teacher = dense[counted] if self.kl_weight else None
        losses = token_losses(self.lm, pruned[counted], batch.answer[counted], teacher, self.kl_weight)
        tokens = counted.sum(1)
        empty = losses[0].new_zeros(counted.shape)
        loss, task, kl = (empty.masked_scatter(counted, x).sum(1) / tokens for x in losses)
        return loss, task, kl

    def _pruned(self, rows: Tensor, keep: Sequence[Tensor]) -> ExitStack:
        """The model as it writes these rows."""
        fill = self.trace.fill and [None if f is None else f[rows] for f in self.trace.fill]
        with ExitStack() as stack:
            if self.pruner.recovery is not None:
                stack.enter_context(self.pruner.recovery.applied(self.lm, merged=False))
            stack.enter_context(Masked().apply(self.sites, Decision([k[rows] for k in keep], fill)))
            return stack.pop_all()


class _Summed(torch.autograd.Function):
    """The groups' losses one after another, each with its gradients: one group's activations exist at a time."""

    @staticmethod
    def forward(ctx: Any, work: _Work, sites: int, wanted: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = [k.detach().requires_grad_(wanted) for k in inputs[:sites]]
        sources = [*keep, *inputs[sites:]]
        gradients = [torch.zeros_like(x) for x in sources] if wanted else []
        total = work.weights.new_zeros(())
        task, kl = torch.zeros_like(work.weights), torch.zeros_like(work.weights)
        for rows in work.groups():
            with torch.set_grad_enabled(wanted):
                loss, task[rows], kl[rows] = work.group(rows, keep)
                part = loss @ work.weights[rows]
            total += part.detach()
            if wanted and part.requires_grad:
                for gradient, more in zip(
                    gradients, torch.autograd.grad(part, sources, allow_unused=True), strict=True
                ):
                    if more is not None:
                        gradient.add_(more)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(task, kl)
        return total, task, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(outer[0] * gradient for gradient in ctx.saved_tensors))
