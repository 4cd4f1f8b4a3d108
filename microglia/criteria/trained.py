"""Train a policy on calibration examples, with the training that the agents always have."""

<<<<<<< HEAD
from dataclasses import dataclass, replace
=======
from collections.abc import Callable
from dataclasses import replace
>>>>>>> exp
from pathlib import Path
from typing import ClassVar

<<<<<<< HEAD
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policies import Policy, StaticPolicy, new_agents
from microglia.tasks.base import Example, Task
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config, train_in_memory
=======
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policy import Policy
from microglia.tasks.base import Example, Task
from microglia.training import TrainingConfig

R = TypeVar("R")
>>>>>>> exp

RECIPE = TrainingConfig(max_steps=100, keep_ratio=0.75, ramp=0.7, save_steps=10_000)


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


def train_on(calibration: Calibration, policy: Policy, config: TrainingConfig) -> Policy:
    """Train a policy in place on the calibration's examples, with its seed; it comes back on the CPU.

    Raises ConfigError for LoRA.
    """
    if config.lora != "none":
        raise ConfigError(f"lora={config.lora!r} was given, but a criterion leaves the model as it is; use lora='none'")
    task, config = CalibrationTask(calibration), replace(config, seed=calibration.seed)
<<<<<<< HEAD
    train_in_memory(calibration.model, calibration.tokenizer, task, calibration.pruner(policy), config)
    return policy.cpu()


@CRITERIA.register("static_baseline")
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
        return train_on(calibration, StaticPolicy.all_kept(calibration.geometries), self.config)

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.detach() for x in self.static(calibration).logits]  # type: ignore[union-attr]


@CRITERIA.register("agents")
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

    def adaptive(self, calibration: Calibration) -> Policy:
        agents = new_agents(self.agents, calibration.geometries, hidden_dim=self.hidden_dim)
        return train_on(calibration, agents, self.config)

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(self.adaptive(calibration))]
=======
    options: dict[str, Any] = {"look": calibration.look, "bucket": calibration.bucket}
    return training(calibration.model, calibration.tokenizer, task, *policy, config, **options)
>>>>>>> exp
