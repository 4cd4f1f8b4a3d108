"""Activation norm: how much each unit writes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import output_columns
from microglia.errors import ConfigError
from microglia.policies import Policy, SignalPolicy
from microglia.units import ProjectedSite

SIGNAL = {"head": "norm", "channel": "contribution"}  # what says it of each prompt


@CRITERIA.register("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(Criterion):
    """Mean ‖o_u‖ over prompt tokens, of channels times the norms of their columns, relative to the site's mean.

    With `projected` it is mean ‖W_O^u o_u‖ at answer tokens, what the unit adds to the residual stream; the
    signals of a prompt do not measure that, so `per_input` needs projected=False.
    """

    projected: bool = False

    name: ClassVar[str] = "norm"
    score: ClassVar[str] = "mean norm of the unit's output (of channels × ‖column of down‖), relative to its site"
    paper: ClassVar[str] = "Mugnaini et al. 2025, AMP; Sandoval-Segura et al. 2025, inactive heads"
    departs: ClassVar[str] = "relative to the site's mean, so that one threshold serves all sites"
    per_input: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("head", "channel")

    def adaptive(self, calibration: Calibration) -> Policy:
        if self.projected:
            raise ConfigError("the projected norm of a prompt is not among its signals; use projected=False")
        return SignalPolicy(SIGNAL[calibration.units[0]])

    def scores(self, calibration: Calibration) -> list[Tensor]:
        if not self.projected:
            return [x.mean(0) for x in calibration.logits(SignalPolicy(SIGNAL[calibration.units[0]]))]
        products = [gram(output_columns(site)) for site in calibration.projected]
        totals = [torch.zeros(g.count) for g in calibration.geometries]

        def add(site: ProjectedSite, outputs: Tensor) -> None:
            squares = torch.einsum("nud,ude,nue->nu", outputs.float(), products[site.index], outputs.float())
            totals[site.index] += squares.clamp(min=0).sqrt().sum(0).cpu()

        calibration.visit_outputs(add)
        return [relative(x) for x in totals]


def gram(columns: Tensor) -> Tensor:
    """(U, D, out) → (U, D, D), by which norms of what units write need nothing of the model's width."""
    return columns @ columns.transpose(1, 2)
