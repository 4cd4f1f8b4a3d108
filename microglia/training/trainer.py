"""The Trainer: transformers' own, with our loss, our curriculum and checkpoints of what is trained only."""

import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from microglia.errors import CheckpointError, MicrogliaError
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import Policy
from microglia.training.config import TrainingConfig
from microglia.training.data import Batch
from microglia.training.loss import distillation_loss, gate_entropy, mean_keep, task_loss
from microglia.training.passes import answer_logits
from microglia.training.schedule import scheduled

WEIGHTS = "trained.safetensors"
DAMPING = 10.0  # of the squared distance to the target; the multiplier alone would oscillate


class Trained(nn.Module):
    """What the Trainer sees: a frozen (or LoRA-adapted) model, a policy, and the multiplier of the target mode.

    The model stays in evaluation mode, so that training sees what inference sees; only gradient checkpointing, which
    transformers ties to the training mode, switches it.
    """

    multiplier: Tensor

    def __init__(self, lm: nn.Module, policy: Policy | None, *, lm_mode: bool = False) -> None:
        super().__init__()
        self.lm, self.policy, self.lm_mode = lm, policy, lm_mode
        self.register_buffer("multiplier", torch.zeros(()))

    def train(self, mode: bool = True) -> "Trained":
        super().train(mode)
        self.lm.train(mode and self.lm_mode)
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes: trainable parameters, the policy with its statistics, the multiplier."""
        state: dict[str, Tensor] = {name: p for name, p in self.named_parameters() if p.requires_grad}
        state |= {f"policy.{name}": x for name, x in (self.policy.state_dict() if self.policy else {}).items()}
        state["multiplier"] = self.multiplier
        return {name: x.detach().clone().contiguous().cpu() for name, x in state.items()}


class Curriculum(TrainerCallback):
    """Where α, the temperature, the noise and the target stand.

    From the share of steps done (so resuming needs nothing).
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.set(0.0)

    def set(self, progress: float) -> None:
        c = self.config
        self.alpha = scheduled(c.schedule, c.alpha, progress)
        self.temperature = scheduled("linear", c.temperature, progress)
        self.noise = scheduled("linear", c.noise, progress)
        self.target = None if c.keep_ratio is None else _approached(c.keep_ratio, progress, c.ramp)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.set(state.global_step / max(state.max_steps - 1, 1))


def _approached(target: float, progress: float, ramp: float) -> float:
    return scheduled("linear", (1.0, target), progress / ramp) if ramp else target


class PruningTrainer(Trainer):
    """Trainer for a `Trained` module. `policy` None in it means: the dense task only (stage 1 of LoRA)."""

    def __init__(self, *, config: TrainingConfig, look: Look, bucket: int | None, **options: Any) -> None:
        super().__init__(**options)
        self.config, self.look, self.bucket = config, look, bucket
        self.curriculum = Curriculum(config)
        self.add_callback(self.curriculum)
        self._gates = ExitStack()  # what must hold until the backward pass is over
        self._sums: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        trained: Trained = self.accelerator.unwrap_model(model)
        loss, parts = self._loss(trained, Batch(**inputs))
        if not torch.isfinite(loss):
            raise MicrogliaError(
                f"the loss became {loss.item()} at step {self.state.global_step}; lower the learning rate (now "
                f"{self.config.learning_rate}) and go on from the last checkpoint with --resume"
            )
        if trained.training:
            for name, value in parts.items():
                self._sums[name].append(float(value.detach() if isinstance(value, Tensor) else value))
        return (loss, {}) if return_outputs else loss

    def _loss(self, trained: Trained, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        c, now = self.config, self.curriculum
        if trained.training:
            gate = Gate(c.gate, temperature=now.temperature, bucket=self.bucket, noise=now.noise)
        else:
            gate = Gate("hard", temperature=now.temperature, bucket=self.bucket)
        dense = None
        if c.distill:
            with torch.no_grad():
                dense, _ = answer_logits(trained.lm, batch, None, gate=gate, look=self.look)
        logits, trace = answer_logits(
            trained.lm,
            batch,
            trained.policy,
            gate=gate,
            look=self.look,
            fill=c.fill,
            scope=c.scope,
            whole=self._gates if c.gradient_checkpointing else None,
        )
        task = task_loss(logits, batch.labels)
        if trained.policy is None:
            return task, {"task": task}
        keep, entropy = mean_keep(trace.keep), gate_entropy(trace.logits, gate.temperature)
        loss = task + c.beta * entropy
        if dense is not None:
            loss = loss + c.distill * distillation_loss(logits, dense, batch.labels)
        if not trained.training:  # evaluations are compared with each other: the weights of the end, not of now
            loss = loss + (c.alpha[1] * keep if c.keep_ratio is None else DAMPING * (keep - c.keep_ratio).clamp(min=0))
        elif now.target is None:
            loss = loss + now.alpha * keep
        else:
            distance = keep - now.target
            loss = loss + float(trained.multiplier) * distance + DAMPING / 2 * distance**2
            # Dual ascent: the longer too many heads are kept, the more each one costs.
            trained.multiplier.add_(c.learning_rate * 10 * distance.detach()).clamp_(min=0)
        parts = {
            "task": task,
            "keep_ratio": keep,
            "gate_entropy": entropy,
            "temperature": gate.temperature,
            "noise": gate.noise,
        }
        weight = (
            {"alpha": now.alpha} if now.target is None else {"target": now.target, "multiplier": trained.multiplier}
        )
        return loss, parts | weight

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a learning rate of their own for LoRA's parameters."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            trained: Any = self.model if model is None else model
            adapters = {id(p) for name, p in trained.named_parameters() if "lora_" in name}
            for group in list(optimizer.param_groups):
                lora = [p for p in group["params"] if id(p) in adapters]
                if lora:
                    group["params"] = [p for p in group["params"] if id(p) not in adapters]
                    optimizer.add_param_group({**group, "params": lora, "lr": self.config.lora_learning_rate})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._gates:
            return super().training_step(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self._gates:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None  # type: ignore[union-attr]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        super().log(
            {name: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for name, v in logs.items()},
            *args,
            **kwargs,
        )

    # --- checkpoints hold what is trained, not the base model ---------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        trained: Trained = self.accelerator.unwrap_model(self.model)
        save_file(trained.trained_state(), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            load_trained(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))


def load_trained(trained: Trained, folder: Path) -> None:
    """Load what `PruningTrainer` saved. Raises CheckpointError when the file is missing, broken or of another run."""
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read ({error}); remove {folder} and resume from an earlier checkpoint"
        ) from error
    expected = trained.trained_state()
    if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in expected.items()}:
        raise CheckpointError(
            f"{folder} was written by a run with other agents or adapters; resume with the options of that run"
        )
    trained.load_state_dict(state, strict=False)
