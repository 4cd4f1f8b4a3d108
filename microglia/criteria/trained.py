"""Train a policy on calibration examples, with the training that the agents have."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policies import Policy
from microglia.tasks.base import Example, Task
from microglia.training import TrainingConfig, train

P = TypeVar("P", bound=Policy)

# The first stage of the demo: hard gates steered to three quarters of the heads.
RECIPE = TrainingConfig(max_steps=100, learning_rate=0.1, keep_ratio=0.75, ramp=0.7, save_steps=10_000)


class Given(Task):
    """The calibration's own examples, whatever split is asked for."""

    name: ClassVar[str] = "given"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.template = calibration.task.template  # type: ignore[misc]
        self.examples = calibration.examples

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        return list(self.examples)

    def load(
        self, split: str, *, limit: int | None = None, seed: int = 0, data_dir: Path | str | None = None
    ) -> list[Example]:
        return list(self.examples)[:limit]


def trained(calibration: Calibration, policy: P, config: TrainingConfig) -> P:
    """Train `policy` in place on the calibration examples, with the calibration's seed. Raises ConfigError for LoRA."""
    if config.lora != "none":
        raise ConfigError(f"lora={config.lora!r} was given, but a criterion leaves the model as it is; use lora='none'")
    with tempfile.TemporaryDirectory() as folder:
        train(
            calibration.model,
            calibration.tokenizer,
            Given(calibration),
            policy,
            replace(config, seed=calibration.seed),
            output_dir=folder,
            look=calibration.look,
            bucket=calibration.bucket,
            quiet=True,
        )
    return policy.cpu()
