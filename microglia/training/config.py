"""The options of a training run: one frozen value, checked here and saved as JSON beside the result."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from microglia.errors import ConfigError, check_choice
from microglia.training.schedule import SCHEDULES

Estimator = Literal["straight-through", "soft"]
Lora = Literal["none", "first", "joint"]
CHOICES: dict[str, Collection[str]] = {
    "schedule": SCHEDULES,
    "estimator": get_args(Estimator),
    "lora": get_args(Lora),
}


# Fields, what their values must fulfil (written so that NaN does not), and how an error says so.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("epochs batch_size learning_rate", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("eval_steps eval_limit save_steps", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("lora_rank lora_steps lora_learning_rate", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("beta distill patience warmup_steps", lambda x: 0 <= x < math.inf, "it must not be negative"),
    (
        "alpha noise temperature",
        lambda ends: len(ends) == 2 and all(0 <= end < math.inf for end in ends),
        "it must be two numbers, start and end, not negative",
    ),
    ("temperature", lambda ends: min(ends) > 0, "both ends must be above 0"),
    ("keep_ratio", lambda x: x is None or 0 < x <= 1, "it must be above 0 and at most 1"),
    ("ramp", lambda x: 0 <= x <= 1, "it must be between 0 and 1"),
    ("seed", lambda x: 0 <= x < 2**32, "it must be at least 0 and below 2**32"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """Defaults are the recipe that the demo uses; see docs/recipe.md for what was tried.

    epochs, max_steps: passes over the examples, or optimiser steps when max_steps is positive.
    limit: number of training examples, None for all (generated tasks need it).
    alpha: weight of mean(keep), from start to end along `schedule` (linear, cosine, exponential).
    beta: weight of the gates' binary entropy, which is minimised: it drives gates to 0 or 1.
    estimator: straight-through (hard forward) or soft (the original's recipe).
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
    estimator: Estimator = "straight-through"
    temperature: tuple[float, float] = (1.0, 1.0)
    noise: tuple[float, float] = (1.0, 0.0)
    keep_ratio: float | None = None
    ramp: float = 0.5
    distill: float = 0.0
    lora: Lora = "none"
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
        for name, options in CHOICES.items():
            check_choice(name, getattr(self, name), options)
        for names, allowed, requirement in RANGES:
            for name in names.split():
                if not allowed(value := getattr(self, name)):
                    raise ConfigError(f"{name}={value} was given; {requirement}")
        if self.schedule == "exponential" and min(self.alpha) <= 0 and self.alpha[0] != self.alpha[1]:
            raise ConfigError(f"alpha={self.alpha} was given; an exponential schedule needs both ends above 0")
