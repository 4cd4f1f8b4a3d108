"""Train a policy on calibration examples, with the training that the agents always have."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policies import Policy
from microglia.pruner import Pruner
from microglia.tasks.base import Example, Task
from microglia.training import TrainingConfig
from microglia.training.static_baseline import train_in_memory

RECIPE = TrainingConfig(max_steps=100, keep_ratio=0.75, ramp=0.7, save_steps=10_000)


class CalibrationTask(Task):
    """The calibration's own examples, whatever split is read."""

    name: ClassVar[str] = "calibration"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.template = calibration.task.template  # type: ignore[misc]
        self.scoring = calibration.task.scoring  # type: ignore[misc]
        self.examples = calibration.examples

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        return list(self.examples)

    def load(
        self, split: str, *, limit: int | None = None, seed: int = 0, data_dir: Path | str | None = None
    ) -> list[Example]:
        return list(self.examples)[:limit]


def train_on(calibration: Calibration, policy: Policy, config: TrainingConfig) -> Pruner:
    """Train a policy in place on the calibration's examples, with its seed; it comes back on the CPU, perhaps with a
    recovery.

    Raises ConfigError for LoRA.
    """
    if config.lora != "none":
        raise ConfigError(f"lora={config.lora!r} was given, but a criterion leaves the model as it is; use lora='none'")
    task, config = CalibrationTask(calibration), replace(config, seed=calibration.seed)
    pruner = calibration.pruner(policy)
    result = train_in_memory(calibration.model, calibration.tokenizer, task, pruner, config)
    policy.cpu()
    return result.pruner
