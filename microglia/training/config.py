"""What a training run is told: one frozen value, checked here, saved as the JSON that travels with the result."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from microglia.errors import ConfigError
from microglia.training.schedule import SCHEDULES

LORA = ("none", "first", "joint")
ABOVE_ZERO = (
    *("batch_size", "learning_rate", "epochs", "eval_steps", "eval_limit", "save_steps"),
    *("lora_rank", "lora_steps", "lora_learning_rate"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """Defaults are the recipe that the demo uses; see docs/recipe.md for what was tried.

    The sentence beside a field is its description everywhere: here and in `microglia train --help-all`.
    """

    epochs: Annotated[float, "Passes over the examples."] = 3.0
    max_steps: Annotated[int, "Steps, instead of epochs if positive."] = -1
    batch_size: Annotated[int, "Examples per step, over all processes."] = 16
    learning_rate: Annotated[float, "Agents' learning rate."] = 3e-3
    limit: Annotated[int | None, "Training examples; all if not given."] = None
    alpha: Annotated[
        tuple[float, float], "Weight of the sparsity loss (the mean keep probability) at the start and at the end."
    ] = (0.01, 0.3)
    schedule: Annotated[Literal["linear", "cosine", "exponential"], "How alpha moves from its start to its end."] = (
        "linear"
    )
    beta: Annotated[float, "Weight of the gates' binary entropy, whose minimum is at 0 and 1."] = 0.01
    gate: Annotated[
        Literal["straight-through", "soft"],
        "Gradient estimator: straight-through (hard gates in the forward pass) or soft (as in the original project).",
    ] = "straight-through"
    temperature: Annotated[tuple[float, float], "Temperature of the gates' sigmoid at the start and at the end."] = (
        1.0,
        1.0,
    )
    noise: Annotated[
        tuple[float, float], "Scale of the logistic noise on the gates' logits at the start and at the end."
    ] = (1.0, 0.0)
    keep_ratio: Annotated[float | None, "Target share of heads; replaces alpha."] = None
    ramp: Annotated[
        float, "Share of the steps over which the target keep ratio falls from 1; 0 applies it from the first step."
    ] = 0.5
    distill: Annotated[float, "Weight of the KL divergence from the dense model's distribution on answer tokens."] = 0.0
    scope: str = "answer"
    fill: str = "zero"
    lora: Annotated[
        Literal["none", "first", "joint"],
        "none, first (before the agents), joint.",
    ] = "none"
    lora_rank: Annotated[int, "Rank of the LoRA adapters."] = 8
    lora_steps: Annotated[int, "Steps of LoRA training on the dense model, with --lora first."] = 100
    lora_learning_rate: Annotated[float, "Learning rate of the LoRA adapters."] = 3e-4
    warmup_steps: Annotated[int, "Steps until the full learning rate is reached."] = 20
    seed: Annotated[int, "Seed of all that is drawn."] = 0
    patience: Annotated[int, "Evaluations without improvement after which training stops; 0 trains to the end."] = 0
    eval_steps: Annotated[int, "Steps between two evaluations on validation examples."] = 100
    eval_limit: Annotated[int, "Number of validation examples."] = 128
    save_steps: Annotated[int, "Steps between two states from which a run can be resumed."] = 100
    report_to: Annotated[str, "Where metrics are logged as well: tensorboard, wandb or trackio."] = "none"
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass to save memory."] = False
    bf16: Annotated[bool, "Mixed precision; decisions and losses stay float32."] = False
    shard: Annotated[bool, "Divide the layers of the base model among the processes of torchrun (FSDP2)."] = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.lora not in LORA:
            raise ConfigError(f"lora={self.lora!r} is unknown; choose one of {', '.join(LORA)}")
        if self.gate not in ("straight-through", "soft"):
            raise ConfigError(f"gate={self.gate!r} cannot be trained; choose straight-through or soft")
        if self.scope not in ("answer", "all"):
            raise ConfigError(f"scope={self.scope!r} is unknown; choose answer or all")
        if self.fill not in ("zero", "mean"):
            raise ConfigError(f"fill={self.fill!r} is unknown; choose zero or mean")
        if self.fill == "mean" and (self.scope == "all" or self.gradient_checkpointing):
            raise ConfigError(
                "fill='mean' is trained with scope='answer' and without gradient checkpointing; change one of them"
            )
        for name in ABOVE_ZERO:
            if not 0 < getattr(self, name) < math.inf:  # so NaN is refused too
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must be above 0")
        for name in ("beta", "distill", "patience", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must not be negative")
        for name in ("alpha", "noise", "temperature"):
            ends = getattr(self, name)
            if len(ends) != 2 or not all(0 <= end < math.inf for end in ends):
                raise ConfigError(f"{name}={ends} was given; it must be two numbers, start and end, not negative")
        if min(self.temperature) == 0:
            raise ConfigError(f"temperature={self.temperature} was given; both ends must be above 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} was given; it must be at least 0 and below 2**32")
        if self.schedule == "exponential" and min(self.alpha) <= 0 and self.alpha[0] != self.alpha[1]:
            raise ConfigError(f"alpha={self.alpha} was given; an exponential schedule needs both ends above 0")
        if not 0 <= self.ramp <= 1:
            raise ConfigError(f"ramp={self.ramp} was given; it must be between 0 and 1")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio={self.keep_ratio} was given; it must be above 0 and at most 1")
