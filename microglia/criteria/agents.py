"""The agents, trained on the calibration prompts."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.criteria.trained import RECIPE, train_on
from microglia.policies import Policy, new_agents
from microglia.signals import usual_signals
from microglia.training import TrainingConfig


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
    units: ClassVar[tuple[str, ...]] = ("head", "channel", "sublayer")
    together: ClassVar[bool] = True

    def adaptive(self, calibration: Calibration) -> Policy:
        agents = new_agents(
            self.agents,
            calibration.geometries,
            signals=usual_signals(calibration.units),
            hidden_dim=self.hidden_dim,
        )
        return train_on(calibration, agents, self.config).policy

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(self.adaptive(calibration))]
