"""What is trained, as one module: a model, a policy and the multiplier; its forward pass is the loss of a batch."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from microglia import processes
from microglia.attach import Trace
from microglia.gate import Gate, keep_ratio
from microglia.passes import Batch, answer_logits
from microglia.pruner import Pruner
from microglia.training.config import TrainingConfig
from microglia.training.loss import answer_losses, answer_tokens, divergences, gate_entropy
from microglia.training.written import written
from microglia.units import StepCosts, step_costs

MULTIPLIER_RATE = 0.1  # of the target mode, the same for agents and their static baseline, whatever their own rates
DAMPING = 10.0  # of the squared distance to the target; the multiplier alone would oscillate


@dataclass(frozen=True)
class ScheduleState:
    """Where the schedules stand: α, the gates' temperature and noise, the target of the keep ratio when there is one,
    and whether the recovery trains yet.
    """

    alpha: float
    temperature: float
    noise: float
    target: float | None
    recovers: bool = True


class Trained(nn.Module):
    """A frozen (or LoRA-adapted) model, a pruner, and the multiplier of the target mode.

    `pruner` None means: the dense task only (stage 1 of LoRA). The model stays in evaluation mode, so that training
    sees what inference sees; only gradient checkpointing, which transformers ties to the training mode, switches it.
    """

    multiplier: Tensor

    def __init__(self, lm: nn.Module, pruner: Pruner | None, config: TrainingConfig) -> None:
        super().__init__()
        self.lm, self.pruner = lm, pruner
        self.policy = None if pruner is None else pruner.policy  # registered, so that its parameters train
        self.recovery = None if pruner is None else pruner.recovery
        self.recipe = config  # `config` would be taken for a transformers model's
        self.register_buffer("multiplier", torch.zeros(()))
        self.costs: StepCosts | None = None
        if pruner is not None and config.byte_share is not None:
            self.costs = step_costs(lm, pruner.sites(lm))

    def train(self, mode: bool = True) -> "Trained":
        super().train(mode)
        self.lm.train(mode and self.recipe.gradient_checkpointing)
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes: trainable parameters, the policy with its statistics, the multiplier."""
        state: dict[str, Tensor] = {name: p for name, p in self.named_parameters() if p.requires_grad}
        state |= {f"policy.{name}": x for name, x in (self.policy.state_dict() if self.policy else {}).items()}
        state["multiplier"] = self.multiplier
        return {name: x.detach().clone().contiguous().cpu() for name, x in state.items()}

    def forward(self, now: ScheduleState, gates: ExitStack, **tensors: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch, and its parts. `gates` holds what must stay until the backward pass is over.

        Of several processes each gets the whole batch and goes through its share of the rows; the loss is that of all.
        """
        share = processes.share(len(tensors["prompt"]))
        rows = share or range(0, share.stop, share.stop)  # with nothing to do: one row, that counts nothing
        batch = Batch(**{name: x[rows.start :: rows.step] for name, x in tensors.items()})
        with torch.autocast(batch.prompt.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return self._loss(batch, rows, len(share), now, gates)

    def _pruner(self, now: ScheduleState, rows: range) -> Pruner | None:
        """The pruner with the gate of this moment: with noise and gradients in training, hard in evaluation."""
        if self.pruner is None:
            return None
        if not now.recovers and self.training:
            return replace(self._gated(now, rows), recovery=None)
        return self._gated(now, rows)

    def _gated(self, now: ScheduleState, rows: range) -> Pruner:
        assert self.pruner is not None
        gate = Gate("hard", now.temperature, bucket=self.pruner.gate.bucket, least_kept=self.pruner.gate.least_kept)
        if self.training:
            gate = replace(gate, mode=self.recipe.estimator, noise=now.noise, rows=rows)
        return replace(self.pruner, gate=gate)

    def _loss(
        self, batch: Batch, rows: range, prompts: int, now: ScheduleState, gates: ExitStack
    ) -> tuple[Tensor, dict[str, Any]]:
        c, pruner = self.recipe, self._pruner(now, rows)
        tokens = answer_tokens(batch.labels).float()
        weights = tokens if c.loss_per == "token" else torch.ones_like(tokens)
        items = int(weights.sum()) if prompts else 0

        def mean(of_answers: Tensor) -> Tensor:
            """Over the answers of all processes, by their weights: task, divergence and price alike."""
            return processes.pooled(of_answers @ weights / weights.sum(), items)

        if pruner is None or self._whole_model_trains():
            loss, task, kl, trace = self._unsplit(batch, pruner, gates)
            loss, task, kl = mean(loss), mean(task), mean(kl)
        else:
            answers = written(self.lm, batch, pruner, weights / weights.sum(), c.kl_weight)
            trace, task, kl = answers.trace, mean(answers.task), mean(answers.kl)
            loss = processes.pooled(answers.loss, items)
        if pruner is None:
            return loss, {"task": task}
        gate = pruner.gate
        keep = mean(keep_ratio(trace.keep))
        spent = keep  # of the budget: in units, or in bytes
        if self.costs is not None:
            spent = mean(self.costs.share(trace.keep).to(keep))
        entropy = processes.pooled(gate_entropy(trace.logits, gate.temperature), prompts)
        loss = loss + c.beta * entropy
        if self.recovery is not None and pruner.recovery is None:  # not yet; a gradient of nothing, for DDP counts them
            loss = loss + 0 * sum(p.sum() for p in self.recovery.parameters())
        if not self.training:  # evaluations are compared with each other: the weights of the end, not of now
            share = c.target_share
            loss = loss + (c.alpha[1] * keep if share is None else DAMPING * (spent - share).clamp(min=0))
        elif now.target is None:
            loss = loss + now.alpha * keep
        else:
            distance = spent - now.target
            loss = loss + float(self.multiplier) * distance + DAMPING / 2 * distance**2
            # Dual ascent: the longer too many heads are kept, the more each one costs.
            self.multiplier.add_(MULTIPLIER_RATE * distance.detach()).clamp_(min=0)
        parts = {
            "task": task,
            **({"kl": kl} if c.kl_weight else {}),
            "keep_ratio": keep,
            **({} if self.costs is None else {"byte_share": spent}),
            "gate_entropy": entropy,
            "temperature": gate.temperature,
            "noise": gate.noise,
            "tokens": tokens.sum() * processes.count(),
        }
        weight = {"alpha": now.alpha} if now.target is None else {"target": now.target, "multiplier": self.multiplier}
        return loss, parts | weight

    def _whole_model_trains(self) -> bool:
        """Whether gradients must reach the prompt's pass, or layers are computed again in the backward pass."""
        return self.recipe.gradient_checkpointing or any(p.requires_grad for p in self.lm.parameters())

    def _unsplit(self, batch: Batch, pruner: Pruner | None, gates: ExitStack) -> tuple[Tensor, Tensor, Tensor, Trace]:
        """Loss, cross entropy and KL per token of each answer (B,), all answers at once, and the decisions."""
        weight = self.recipe.kl_weight if pruner is not None else 0.0
        dense = None
        if weight:
            with torch.no_grad():
                dense, _ = answer_logits(self.lm, batch, None)
        whole = gates if self.recipe.gradient_checkpointing else None
        logits, trace = answer_logits(self.lm, batch, pruner, whole=whole)
        task = answer_losses(logits, batch.labels)
        kl = torch.zeros_like(task) if dense is None else divergences(logits, dense, batch.labels)
        return (1 - weight) * task + weight * kl, task, kl, trace
