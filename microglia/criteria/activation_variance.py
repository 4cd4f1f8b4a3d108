"""Activation variance with a budget that follows depth: middle sites lose heads, the deeper the more."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.criteria.moments import moments
from microglia.criteria.weights import head_weights
from microglia.errors import ConfigError

PROTECTED = 1e-3  # rate of the first and the last site: they lose heads only when the others have none to lose


@CRITERIA.register("activation_variance")
@dataclass(frozen=True, kw_only=True)
class ActivationVariance(Criterion):
    """Σ variance × ‖o column‖ orders the heads of a site; a logistic function of depth says how fast sites lose them.

    steepness: of the logistic from the first site to the last, 0 for equal rates.
    """

    steepness: float = 4.0

    name: ClassVar[str] = "activation_variance"
    score: ClassVar[str] = "Σ variance × ‖o column‖, as a share of the site, ÷ a rate that is logistic in depth"
    paper: ClassVar[str] = "Liang et al. 2025, SEAP"
    departs: ClassVar[str] = "one task, hence no task router; heads only; the steepness is ours"

    def __post_init__(self) -> None:
        if self.steepness < 0:
            raise ConfigError(f"steepness={self.steepness} was given; it must be 0 or more")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        scores = []
        rates = depth_rates(len(calibration.heads), self.steepness)
        for site, outputs, rate in zip(calibration.heads, moments(calibration), rates, strict=True):
            strength = (outputs.variance * head_weights(site).o.norm(dim=-1).cpu()).sum(-1)  # (H,)
            share = (strength.argsort().argsort() + 1) / len(strength)
            # A threshold t takes the share t · rate of the site's heads.
            scores.append(share / rate)
        return scores


def depth_rates(sites: int, steepness: float) -> list[float]:
    """How fast each site loses heads: logistic in depth between protected ends."""
    middle = [1 / (1 + math.exp(-steepness * (i / max(sites - 1, 1) - 0.5))) for i in range(sites)]
    return [PROTECTED if i in (0, sites - 1) else rate for i, rate in enumerate(middle)]
