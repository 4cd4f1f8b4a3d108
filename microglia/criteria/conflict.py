"""Conflict: heads that pull against the rest of their layer go first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.policies import Policy, SignalPolicy


@CRITERIA.register("conflict")
@dataclass(frozen=True, kw_only=True)
class ConflictCriterion(Criterion):
    """Mean cosine, over prompt tokens, of what the head adds with what the other heads of its layer add."""

    name: ClassVar[str] = "conflict"
    score: ClassVar[str] = "mean cosine of the head's contribution with the sum of the others'"
    paper: ClassVar[str] = "PH3 (Jin et al. 2024), which cuts heads of conflicting knowledge"
    departs: ClassVar[str] = "conflict with the other heads of the layer, in place of causal traces of knowledge"
    per_input: ClassVar[bool] = True

    def adaptive(self, calibration: Calibration) -> Policy:
        return SignalPolicy("conflict")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(SignalPolicy("conflict"))]
