"""The options of a training run: one frozen value, checked here and saved as JSON beside the result."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from microglia.errors import ConfigError, check_choice

# Fields, what their values must fulfil (written so that NaN does not), and how an error says so.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("epochs batch_size learning_rate", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("eval_steps eval_limit save_steps", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("lora_rank lora_steps lora_learning_rate", lambda x: 0 < x < math.inf, "it must be above 0"),
    ("recovery_learning_rate continuation_tokens", lambda x: 0 < x < math.inf, "it must be above 0"),
    (
        "beta patience warmup_steps continuation_temperature self_prompts recovery",
        lambda x: 0 <= x < math.inf,
        "it must not be negative",
    ),
    (
        "alpha noise temperature",
        lambda ends: len(ends) == 2 and all(0 <= end < math.inf for end in ends),
        "it must be two numbers, start and end, not negative",
    ),
    ("temperature", lambda ends: min(ends) > 0, "both ends must be above 0"),
    ("keep_ratio byte_share", lambda x: x is None or 0 < x <= 1, "it must be above 0 and at most 1"),
    ("ramp recovery_start", lambda x: 0 <= x <= 1, "it must be between 0 and 1"),
    ("seed", lambda x: 0 <= x < 2**32, "it must be at least 0 and below 2**32"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """Defaults are the recipe that the demo uses; see docs/results.md for what was tried.

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
    estimator: Annotated[
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
    keep_ratio: Annotated[float | None, "Target share of units; replaces alpha."] = None
    byte_share: Annotated[float | None, "Target share of a step's bytes instead."] = None
    ramp: Annotated[
        float, "Share of the steps over which the target falls from 1; 0 applies it from the first step."
    ] = 0.5
    loss_per: Annotated[
        Literal["token", "example"],
        "Average loss and price over the tokens of all answers, as time is spent, or over examples, short or long.",
    ] = "token"
    target: Annotated[
        str | None,
        "model (what the dense model says; prompts are enough), gold (worked answers), or the weight of the former.",
        "model; gold on the reasoner",
    ] = None
    continuation_tokens: Annotated[int, "Longest continuation that the dense model writes."] = 128
    continuation_temperature: Annotated[float, "Temperature at which it writes; 0 is greedy."] = 0.0
    self_prompts: Annotated[int, "Prompts that a chat model asks itself, beside those of --dataset prompts."] = 0
    start: Annotated[str | None, "Criterion by whose ranks the policy starts, norm say.", "every unit kept alike"] = (
        None
    )
    recovery: Annotated[int, "Rank of the recovery; 0 for none."] = 0
    recovery_start: Annotated[float, "Share of the steps after which the recovery trains as well."] = 0.0
    recovery_learning_rate: Annotated[float, "Learning rate of the recovery."] = 1e-3
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

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "TrainingConfig":
        """From options by name. Raises ConfigError for one that there is not."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise ConfigError(f"training has no option {', '.join(unknown)}; choose from {', '.join(known)}")
        return cls(**options)

    @property
    def target_share(self) -> float | None:
        """What the kept share is steered to, in units or in bytes."""
        return self.keep_ratio if self.byte_share is None else self.byte_share

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_choice(name, getattr(self, name), get_args(kind))
        for names, allowed, requirement in RANGES:
            for name in names.split():
                if not allowed(value := getattr(self, name)):
                    raise ConfigError(f"{name}={value} was given; {requirement}")
        _ = self.kl_weight
        if self.recovery and (self.gradient_checkpointing or self.lora == "joint"):
            other = "gradient_checkpointing" if self.gradient_checkpointing else "lora='joint'"
            raise ConfigError(f"recovery={self.recovery} was given with {other}; leave one of them out")
        if self.keep_ratio is not None and self.byte_share is not None:
            raise ConfigError(
                f"keep_ratio={self.keep_ratio} and bytes={self.byte_share} were given; a training has one target"
            )
        if self.schedule == "exponential" and min(self.alpha) <= 0 and self.alpha[0] != self.alpha[1]:
            raise ConfigError(f"alpha={self.alpha} was given; an exponential schedule needs both ends above 0")

    @property
    def kl_weight(self) -> float:
        """The weight of KL(dense ‖ pruned) in the loss, of which cross entropy is the rest. Raises ConfigError."""
        named = {None: 1.0, "model": 1.0, "gold": 0.0}
        try:
            weight = named[self.target] if self.target in named else float(str(self.target))
        except ValueError:
            weight = math.nan
        if not 0 <= weight <= 1:
            raise ConfigError(f"target={self.target!r} was given; choose model, gold or a weight between 0 and 1")
        return weight
