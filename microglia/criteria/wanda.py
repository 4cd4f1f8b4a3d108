"""Wanda: a weight counts as much as what it is multiplied with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import output_columns
from microglia.units import ProjectedSite


@CRITERIA.register("wanda")
@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Σ |w| · ‖x‖ over the unit's columns of o or down, x their inputs at answer tokens; relative to its site."""

    name: ClassVar[str] = "wanda"
    score: ClassVar[str] = "Σ |w|·‖x‖ over the unit's columns of o or down, relative to its site"
    paper: ClassVar[str] = "Sun et al. 2024, Wanda, in the structured form of An et al. 2024 (Wanda-sp)"
    departs: ClassVar[str] = "at answer tokens; one threshold over all layers in place of the same share in each"
    units: ClassVar[tuple[str, ...]] = ("head", "channel")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        columns = [output_columns(site).abs().sum(-1).cpu() for site in calibration.projected]  # (U, D)
        squares = [torch.zeros_like(x) for x in columns]

        def add(site: ProjectedSite, outputs: Tensor) -> None:
            squares[site.index] += outputs.float().square().sum(0).cpu()

        calibration.visit_outputs(add)
        return [relative((x.sqrt() * w).sum(-1)) for x, w in zip(squares, columns, strict=True)]
