"""What is trained, as one module: a model, a policy and the multiplier; its forward pass is the loss of a batch."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from microglia import processes
from microglia.gate import Gate
from microglia.passes import Batch, answer_logits
from microglia.pruner import Pruner
from microglia.training.config import TrainingConfig
from microglia.training.loss import distillation_loss, gate_entropy, mean_keep, task_loss
from microglia.units import StepCosts, step_costs

MULTIPLIER_RATE = 0.1  # of the target mode, the same for agents and their static baseline, whatever their own rates
DAMPING = 10.0  # of the squared distance to the target; the multiplier alone would oscillate


@dataclass(frozen=True)
class ScheduleState:
    """Where the schedules stand: α, the gates' temperature and noise, and the target when there is one."""

    alpha: float
    temperature: float
    noise: float
    target: float | None


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
        bucket = self.pruner.gate.bucket
        if self.training:
            gate = Gate(self.recipe.estimator, temperature=now.temperature, bucket=bucket, noise=now.noise, rows=rows)
        else:
            gate = Gate("hard", temperature=now.temperature, bucket=bucket)
        return replace(self.pruner, gate=gate)

    def _loss(
        self, batch: Batch, rows: range, prompts: int, now: ScheduleState, gates: ExitStack
    ) -> tuple[Tensor, dict[str, Any]]:
        c, pruner = self.recipe, self._pruner(now, rows)
        dense = None
        if c.distill:
            with torch.no_grad():
                dense, _ = answer_logits(self.lm, batch, None)
        logits, trace = answer_logits(self.lm, batch, pruner, whole=gates if c.gradient_checkpointing else None)
        tokens = int((batch.labels != -100).sum()) if prompts else 0
        task = processes.pooled(task_loss(logits, batch.labels), tokens)
        if pruner is None:
            return task, {"task": task}
        gate = pruner.gate
        keep = processes.pooled(mean_keep(trace.keep), prompts)
        spent = keep  # of the budget: in units, or in bytes
        if self.costs is not None:
            spent = processes.pooled(self.costs.share(trace.keep).mean().to(keep), prompts)
        entropy = processes.pooled(gate_entropy(trace.logits, gate.temperature), prompts)
        loss = task + c.beta * entropy
        if dense is not None:
            loss = loss + c.distill * processes.pooled(distillation_loss(logits, dense, batch.labels), tokens)
        if not self.training:  # evaluations are compared with each other: the weights of the end, not of now
            loss = loss + (c.alpha[1] * keep if c.target is None else DAMPING * (spent - c.target).clamp(min=0))
        elif now.target is None:
            loss = loss + now.alpha * keep
        else:
            distance = spent - now.target
            loss = loss + float(self.multiplier) * distance + DAMPING / 2 * distance**2
            # Dual ascent: the longer too many heads are kept, the more each one costs.
            self.multiplier.add_(MULTIPLIER_RATE * distance.detach()).clamp_(min=0)
        parts = {
            "task": task,
            "keep_ratio": keep,
            **({} if self.costs is None else {"byte_share": spent}),
            "gate_entropy": entropy,
            "temperature": gate.temperature,
            "noise": gate.noise,
        }
        weight = {"alpha": now.alpha} if now.target is None else {"target": now.target, "multiplier": self.multiplier}
        return loss, parts | weight
