"""Second order: how much the loss curves in the head's weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from microglia.anatomy.projection import oriented, plain
from microglia.criteria.base import CRITERIA, Criterion, check_positive
from microglia.criteria.calibration import Calibration
from microglia.criteria.weights import head_weights


@CRITERIA.register("hessian")
@dataclass(frozen=True, kw_only=True)
class Hessian(Criterion):
    """Tr(H)/2p · ‖w‖² of the head's o slice (p weights), the loss's rise when they are set to zero.

    The trace of each head's block comes from Hutchinson's estimator: the mean of v ⊙ Hv over `probes` random signs v.
    """

    probes: int = 4

    name: ClassVar[str] = "hessian"
    examples: ClassVar[int] = 512
    score: ClassVar[str] = "relative Hessian trace of the head's o slice (Hutchinson) × ‖w‖²"
    paper: ClassVar[str] = "Yu et al. 2022, HAP"
    departs: ClassVar[str] = (
        "the o slice alone, whose loss removes the head; no neural implant in place of pruned parts"
    )

    def __post_init__(self) -> None:
        check_positive(probes=self.probes)

    def draw(self, weights: list[Tensor]) -> list[list[Tensor]]:
        """Probes: random signs for every weight."""
        return [[torch.randint_like(w, 2) * 2 - 1 for w in weights] for _ in range(self.probes)]

    def scores(self, calibration: Calibration) -> list[Tensor]:
        squares = [head_weights(site).o.square().mean((1, 2)).cpu() for site in calibration.heads]  # ‖w‖² / p
        layers: list[Any] = [plain(site.output) for site in calibration.heads]
        weights = [layer.weight.requires_grad_() for layer in layers]
        traces = [torch.zeros(g.count) for g in calibration.geometries]
        # Fused attention kernels cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            for batch in calibration.batches:
                loss = calibration.losses(batch).sum() / len(calibration.examples)
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                for probe in (probes := self.draw(weights)):
                    curved = torch.autograd.grad(gradients, weights, probe, retain_graph=True)
                    for site, layer, v, hv in zip(calibration.heads, layers, probe, curved, strict=True):
                        columns = oriented(layer, v * hv).float().sum(0)  # (H·D,)
                        traces[site.index] += site.geometry.split(columns).sum(-1).cpu() / len(probes)
        return [trace / 2 * w for trace, w in zip(traces, squares, strict=True)]
