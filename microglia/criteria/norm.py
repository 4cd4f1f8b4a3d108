"""Activation norm: how much each head writes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, relative
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import head_weights
from microglia.errors import ConfigError
from microglia.policies import Policy, SignalPolicy
from microglia.units import HeadSite


@CRITERIA.register("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(Criterion):
    """Mean ‖o_h‖ over prompt tokens, relative to the site's mean, then over prompts.

    With `projected` it is mean ‖W_O^h o_h‖ at answer tokens, what the head adds to the residual stream; the
    signals of a prompt do not measure that, so `per_input` needs projected=False.
    """

    projected: bool = False

    name: ClassVar[str] = "norm"
    score: ClassVar[str] = "mean norm of the head's output, relative to its site"
    paper: ClassVar[str] = "Mugnaini et al. 2025, AMP; Sandoval-Segura et al. 2025, inactive heads"
    departs: ClassVar[str] = "relative to the site's mean, so that one threshold serves all sites"
    per_input: ClassVar[bool] = True

    def adaptive(self, calibration: Calibration) -> Policy:
        if self.projected:
            raise ConfigError("the projected norm of a prompt is not among its signals; use projected=False")
        return SignalPolicy("norm")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        if not self.projected:
            return [x.mean(0) for x in calibration.logits(SignalPolicy("norm"))]
        weights = [head_weights(site).o for site in calibration.sites]  # (H, D, out)
        totals = [torch.zeros(g.heads) for g in calibration.geometries]

        def add(site: HeadSite, outputs: Tensor) -> None:
            written = torch.einsum("nhd,hdo->nho", outputs.float(), weights[site.index])
            totals[site.index] += written.norm(dim=-1).sum(0).cpu()

        calibration.visit_outputs(add)
        return [relative(x) for x in totals]
