"""Cascade: a head position that was dropped stays dropped in every deeper site."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.units import ProjectedSite


@CRITERIA.register("cascade")
@dataclass(frozen=True, kw_only=True)
class Cascade(Criterion):
    """Mean magnitude of the head's output, averaged over this site and all earlier ones.

    The score is the least of these averages so far, so under any threshold the kept positions of a site hold those of
    the next. Raises ConfigError when sites differ in their number of heads.
    """

    name: ClassVar[str] = "cascade"
    score: ClassVar[str] = "least so far, along depth, of the running mean of |output| at this head position"
    paper: ClassVar[str] = "Wang et al. 2021, SpAtten"
    departs: ClassVar[str] = "running mean in place of a sum, one threshold in place of a top-k per layer; static"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        counts = sorted({g.count for g in calibration.geometries})
        if len(counts) > 1:
            raise ConfigError(f"cascade needs the same heads in every site, but there are {counts}; choose another")
        sums = [torch.zeros(counts[0]) for _ in calibration.heads]

        def add(site: ProjectedSite, outputs: Tensor) -> None:
            sums[site.index] += outputs.float().abs().sum((0, 2)).cpu()

        calibration.visit_outputs(add)
        magnitudes = torch.stack([relative(x) for x in sums])  # (S, H)
        running = magnitudes.cumsum(0) / torch.arange(1, len(sums) + 1)[:, None]
        return list(running.cummin(0).values)
