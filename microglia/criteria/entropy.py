"""Attention entropy: heads that attend to few tokens stay."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.policies import Policy, SignalPolicy


@CRITERIA.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(Criterion):
    """One minus the mean normalised entropy of the head's attention over the prompt's last tokens."""

    name: ClassVar[str] = "entropy"
    score: ClassVar[str] = "1 − mean normalised entropy of the head's attention"
    paper: ClassVar[str] = "Voita et al. 2019, confident heads; the second statistic of microglia-pruning"
    departs: ClassVar[str] = "entropy, divided by the log of the visible keys, in place of the largest weight"
    per_input: ClassVar[bool] = True

    def adaptive(self, calibration: Calibration) -> Policy:
        return SignalPolicy("entropy")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(SignalPolicy("entropy"))]
