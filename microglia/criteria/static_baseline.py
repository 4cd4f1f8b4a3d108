"""Learned gates that depend on no input: the agents' static baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration, untouched
from microglia.criteria.start import start_from
from microglia.criteria.trained import RECIPE, train_on
from microglia.policies import Policy, StaticPolicy
from microglia.pruner import Pruner
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config

BASELINE = baseline_config(RECIPE)


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
    units: ClassVar[tuple[str, ...]] = ("head", "channel", "sublayer")
    together: ClassVar[bool] = True

    def static(self, calibration: Calibration) -> Policy:
        return self._trained(calibration).policy

    def pruner(self, calibration: Calibration, *, per_input: bool = False) -> Pruner:
        if per_input:
            return super().pruner(calibration, per_input=True)  # which says that there is no such thing
        with untouched(calibration):
            trained = self._trained(calibration)
        trained.policy.to(calibration.device).requires_grad_(False).eval()
        return calibration.pruner(trained.policy, trained.recovery)

    def _trained(self, calibration: Calibration) -> Pruner:
        policy = StaticPolicy.all_kept(calibration.geometries)
        if self.config.start is not None:
            start_from(self.config.start, policy, calibration)
        return train_on(calibration, policy, self.config)

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.detach() for x in self.static(calibration).logits]  # type: ignore[union-attr]
