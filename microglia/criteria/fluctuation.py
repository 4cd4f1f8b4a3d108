"""Fluctuation: a unit that always writes the same can be replaced by its mean."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, standardised
from microglia.criteria.calibration import Calibration
from microglia.criteria.moments import moments
from microglia.criteria.weights import output_columns
from microglia.pruner import Fill


@CRITERIA.register("fluctuation")
@dataclass(frozen=True, kw_only=True)
class Fluctuation(Criterion):
    """Variance of each value that the unit writes × squared norm of its column of o or down, summed over the unit."""

    name: ClassVar[str] = "fluctuation"
    score: ClassVar[str] = "Σ variance of the unit's output × ‖column of o or down‖², standardised per site"
    paper: ClassVar[str] = "An et al. 2024, FLAP"
    departs: ClassVar[str] = "at answer tokens; the removed mean is the prompt's (fill=\"mean\"), not the calibration's"
    fill: ClassVar[Fill] = "mean"
    units: ClassVar[tuple[str, ...]] = ("head", "channel")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        scores = []
        for site, outputs in zip(calibration.projected, moments(calibration), strict=True):
            columns = output_columns(site).square().sum(-1).cpu()  # (U, D)
            scores.append(standardised((outputs.variance * columns).sum(-1)))
        return scores
