"""Weight magnitude: how large the head's own slices of q, k, v and o are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import head_weights
from microglia.sites import Site


@dataclass(frozen=True, kw_only=True)
class Weight(Criterion):
    """L2 norm of the head's slices, relative to the site's mean. Heads share their group's k and v equally."""

    name: ClassVar[str] = "weight"
    score: ClassVar[str] = "L2 norm of the head's q, k, v and o slices, relative to its site"
    paper: ClassVar[str] = "Han et al. 2015, magnitude pruning; Li et al. 2017, whole filters by norm"
    departs: ClassVar[str] = "L2 over whole heads; biases left out; a group's k and v divided among its query heads"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [relative(squared_norms(site).sqrt()) for site in calibration.sites]


def squared_norms(site: Site) -> Tensor:
    """Squared L2 norm of each head's slices, (H,)."""
    w, g = head_weights(site), site.geometry
    shared = (w.k.pow(2).sum((1, 2)) + w.v.pow(2).sum((1, 2))) / g.queries_per_group  # (G,)
    return w.q.pow(2).sum((1, 2)) + w.o.pow(2).sum((1, 2)) + shared.repeat_interleave(g.queries_per_group)
