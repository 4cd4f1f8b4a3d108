"""The static baseline and the agents as criteria: trained on the calibration's examples, as the agents always are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from microglia.criteria.base import Criterion
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policy import Policy, new_agents
from microglia.tasks.base import Example, Task
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config, train_in_memory, train_static_baseline

R = TypeVar("R")

RECIPE = TrainingConfig(max_steps=100, keep_ratio=0.75, ramp=0.7, save_steps=10_000)
BASELINE = baseline_config(RECIPE)


class CalibrationTask(Task):
    """The calibration's own examples, whatever split is read."""

    name: ClassVar[str] = "calibration"
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


def train_on(calibration: Calibration, training: Callable[..., R], *policy: Policy, config: TrainingConfig) -> R:
    """Call `train_in_memory` or `train_static_baseline` with the calibration's examples and seed.

    Raises ConfigError for LoRA.
    """
    if config.lora != "none":
        raise ConfigError(f"lora={config.lora!r} was given, but a criterion leaves the model as it is; use lora='none'")
    task, config = CalibrationTask(calibration), replace(config, seed=calibration.seed)
    options: dict[str, Any] = {"look": calibration.look, "bucket": calibration.bucket}
    return training(calibration.model, calibration.tokenizer, task, *policy, config, **options)


@dataclass(frozen=True, kw_only=True)
class StaticBaseline(Criterion):
    """One free logit per head, trained with the loss of the agents; 0 is where training would cut."""

    config: TrainingConfig = BASELINE

    name: ClassVar[str] = "static_baseline"
    score: ClassVar[str] = "the head's own logit, trained with the agents' loss and no input"
    paper: ClassVar[str] = "Voita et al. 2019 and Louizos et al. 2018, gates learned with an L0 penalty"
    departs: ClassVar[str] = (
        "straight-through gates and the agents' loss in place of hard concrete; the model is frozen"
    )

    def static(self, calibration: Calibration) -> Policy:
        return train_on(calibration, train_static_baseline, config=self.config).cpu()

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.detach() for x in self.static(calibration).logits]  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Agents(Criterion):
    """Agents, which decide for each prompt; where every prompt is treated alike, their mean logits over the prompts.

    agents, hidden_dim: which, as in `new_agents`.
    """

    config: TrainingConfig = RECIPE
    agents: str = "agents"
    hidden_dim: int | None = None

    name: ClassVar[str] = "agents"
    score: ClassVar[str] = "the logit that an agent of the layer gives the head for this prompt"
    paper: ClassVar[str] = "this project's own, after microglia-pruning"
    departs: ClassVar[str] = "trained on the calibration prompts, by the recipe of the static baseline"
    per_input: ClassVar[bool] = True

    def look_at(self, calibration: Calibration) -> Policy:
        agents = new_agents(self.agents, calibration.geometries, hidden_dim=self.hidden_dim)
        train_on(calibration, train_in_memory, agents, config=self.config)
        return agents.cpu()

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(self.look_at(calibration))]
