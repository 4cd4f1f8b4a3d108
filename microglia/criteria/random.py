"""Random scores: the baseline that a criterion has to beat first."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration


@CRITERIA.register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Independent uniform scores, drawn with the calibration's seed."""

    name: ClassVar[str] = "random"
    score: ClassVar[str] = "a random number, seeded"
    paper: ClassVar[str] = "Peng et al. 2025, UniPruneBench, where random pruning is a strong baseline"
    departs: ClassVar[str] = "theirs drops visual tokens, ours heads"
    units: ClassVar[tuple[str, ...]] = ("head", "channel", "sublayer")
    together: ClassVar[bool] = True

    def scores(self, calibration: Calibration) -> list[Tensor]:
        generator = torch.Generator().manual_seed(calibration.seed)
        return [torch.rand(g.count, generator=generator) for g in calibration.geometries]
