"""First-order Taylor: how much the loss would change if the head's gate moved."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, unit_length
from microglia.criteria.calibration import Calibration


@CRITERIA.register("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Mean over examples of |∂loss/∂keep_h| at keep 1, divided by its L2 norm over the site's heads."""

    name: ClassVar[str] = "taylor"
    examples: ClassVar[int] = 512
    score: ClassVar[str] = "mean |∂loss/∂keep|, L2-normalised per site"
    paper: ClassVar[str] = "Michel et al. 2019, Are Sixteen Heads Really Better than One?"
    departs: ClassVar[str] = "gates act on the answer's positions only; one pass for all budgets, not pruned in rounds"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [unit_length(x.abs().mean(0)) for x in calibration.keep_gradients()]
