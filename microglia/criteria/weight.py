"""Weight magnitude: how large the unit's own slices of the projections are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import by_head, channel_squares, matrices
from microglia.units import ChannelSite, HeadSite, ProjectedSite


@CRITERIA.register("weight")
@dataclass(frozen=True, kw_only=True)
class Weight(Criterion):
    """L2 norm of the unit's slices, relative to the site's mean. Heads share their group's k and v equally."""

    name: ClassVar[str] = "weight"
    score: ClassVar[str] = "L2 norm of the unit's slices (q, k, v and o; gate, up and down), relative to its site"
    paper: ClassVar[str] = "Han et al. 2015, magnitude pruning; Li et al. 2017, whole filters by norm"
    departs: ClassVar[str] = "L2 over whole heads; biases left out; a group's k and v divided among its query heads"
    units: ClassVar[tuple[str, ...]] = ("head", "channel")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [relative(squares(site).sqrt()) for site in calibration.projected]


def squares(site: ProjectedSite) -> Tensor:
    """The sum of squares of everything that is the unit's own, (U,)."""
    if isinstance(site, HeadSite):
        return by_head(site, {name: w.square() for name, w in matrices(site).items()}).sums()
    assert isinstance(site, ChannelSite)
    return channel_squares(site)
