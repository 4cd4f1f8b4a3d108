"""Upper layers first: depth decides, the norm only among the heads of one site."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.policies import SignalPolicy


@CRITERIA.register("upper_layers")
@dataclass(frozen=True, kw_only=True)
class UpperLayers(Criterion):
    """The uppermost site loses its heads first, the least written first; then the site below it."""

    name: ClassVar[str] = "upper_layers"
    score: ClassVar[str] = "−depth; within a site, the mean norm of the head's output"
    paper: ClassVar[str] = "Liu & Liu 2025, HARP"
    departs: ClassVar[str] = "no searched rescaling of what is left; a site keeps one rectangle of heads at least"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        norms = [x.mean(0) for x in calibration.logits(SignalPolicy("norm"))]
        return [x / (1 + x) - depth for depth, x in enumerate(norms)]  # a norm moves a head by less than a site
