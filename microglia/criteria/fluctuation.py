"""Fluctuation: a head that always writes the same can be replaced by its mean."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, standardised
from microglia.criteria.calibration import Calibration
from microglia.criteria.moments import moments
from microglia.criteria.weights import head_weights
from microglia.pruner import Fill


@CRITERIA.register("fluctuation")
@dataclass(frozen=True, kw_only=True)
class Fluctuation(Criterion):
    """Variance of each value that the head writes × squared norm of its column of o, summed over the head."""

    name: ClassVar[str] = "fluctuation"
    score: ClassVar[str] = "Σ variance of the head's output × ‖o column‖², standardised per site"
    paper: ClassVar[str] = "An et al. 2024, FLAP"
    departs: ClassVar[str] = "at answer tokens; the removed mean is the prompt's (fill=\"mean\"), not the calibration's"
    fill: ClassVar[Fill] = "mean"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        scores = []
        for site, outputs in zip(calibration.sites, moments(calibration), strict=True):
            columns = head_weights(site).o.square().sum(-1).cpu()  # (H, D)
            scores.append(standardised((outputs.variance * columns).sum(-1)))
        return scores
