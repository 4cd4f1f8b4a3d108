"""What a training run is told: one frozen value, checked here, saved as the JSON that travels with the result."""

import math
from dataclasses import dataclass
from typing import Literal

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

    epochs, max_steps: passes over the examples, or optimiser steps when max_steps is positive.
    limit: number of training examples, None for all (generated tasks need it).
    alpha: weight of mean(keep), from start to end along `schedule` (linear, cosine, exponential).
    beta: weight of the gates' binary entropy, which is minimised: it drives gates to 0 or 1.
    estimator: of the gates' gradient, straight-through (hard forward) or soft (the original's recipe).
    temperature: of the gates' sigmoid, start and end. noise: scale of logistic noise on the logits, start and end.
    keep_ratio: when given, a Lagrange multiplier steers the mean keep to it and alpha is not used.
    ramp: share of the steps in which that target comes down from 1; 0 asks for it from the start.
    distill: weight of KL(dense ‖ pruned) on answer tokens.
    lora: none; first (adapters on the dense task for `lora_steps`, then frozen); joint (trained with the agents).
        Adapters learn at `lora_learning_rate`, agents at `learning_rate`.
    batch_size: examples of a step, all processes together. bf16: mixed precision; decisions and losses stay float32.
    shard: divide the layers of the base model among the processes (FSDP2), when it is larger than one device.
    patience: evaluations without improvement until training stops, 0 to train to the end.
    """

    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 16
    learning_rate: float = 3e-3
    limit: int | None = None
    alpha: tuple[float, float] = (0.01, 0.3)
    schedule: str = "linear"
    beta: float = 0.01
    estimator: Literal["straight-through", "soft"] = "straight-through"
    temperature: tuple[float, float] = (1.0, 1.0)
    noise: tuple[float, float] = (1.0, 0.0)
    keep_ratio: float | None = None
    ramp: float = 0.5
    distill: float = 0.0
    lora: str = "none"
    lora_rank: int = 8
    lora_steps: int = 100
    lora_learning_rate: float = 3e-4
    warmup_steps: int = 20
    seed: int = 0
    patience: int = 0
    eval_steps: int = 100
    eval_limit: int = 128
    save_steps: int = 100
    report_to: str = "none"
    gradient_checkpointing: bool = False
    bf16: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.lora not in LORA:
            raise ConfigError(f"lora={self.lora!r} is unknown; choose one of {', '.join(LORA)}")
        if self.estimator not in ("straight-through", "soft"):
            raise ConfigError(f"estimator={self.estimator!r} cannot be trained; choose straight-through or soft")
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
