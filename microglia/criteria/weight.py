"""Weight magnitude: how large the head's own slices of q, k, v and o are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import by_head, matrices


@CRITERIA.register("weight")
@dataclass(frozen=True, kw_only=True)
class Weight(Criterion):
    """L2 norm of the head's slices, relative to the site's mean. Heads share their group's k and v equally."""

    name: ClassVar[str] = "weight"
    score: ClassVar[str] = "L2 norm of the head's q, k, v and o slices, relative to its site"
    paper: ClassVar[str] = "Han et al. 2015, magnitude pruning; Li et al. 2017, whole filters by norm"
    departs: ClassVar[str] = "L2 over whole heads; biases left out; a group's k and v divided among its query heads"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [
            relative(by_head(site, {name: w.square() for name, w in matrices(site).items()}).sums().sqrt())
            for site in calibration.sites
        ]
