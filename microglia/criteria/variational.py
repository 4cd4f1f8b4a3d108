"""Variational gates: a head whose gate may be noisy carries little information."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, check_positive
from microglia.criteria.calibration import Calibration
from microglia.criteria.descent import descend
from microglia.passes import Batch


@CRITERIA.register("variational")
@dataclass(frozen=True, kw_only=True)
class Variational(Criterion):
    """Gates z = μ + σε per head, trained on answer loss + weight · mean KL; the score is μ²/σ²."""

    steps: int = 100
    learning_rate: float = 0.03
    weight: float = 0.1

    name: ClassVar[str] = "variational"
    score: ClassVar[str] = "μ²/σ² of a noisy gate μ + σε, trained with a KL term"
    paper: ClassVar[str] = "Dutta et al. 2024, VTrans; Dai et al. 2018, variational information bottleneck"
    departs: ClassVar[str] = "the model is frozen; gates on heads only, not on embeddings, layers and neurons"

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, learning_rate=self.learning_rate, weight=self.weight)

    def scores(self, calibration: Calibration) -> list[Tensor]:
        mean = [k.requires_grad_() for k in calibration.keeps()]  # (1, H)
        spread = [torch.full_like(m, 0.1).log().requires_grad_() for m in mean]  # log σ

        def loss(batch: Batch) -> Tensor:
            shape = len(batch.prompt), -1
            keep = [m + s.exp() * torch.randn_like(m.expand(shape)) for m, s in zip(mean, spread, strict=True)]
            return calibration.losses(batch, keep).mean() + self.weight * divergence(mean, spread)

        descend(calibration, [*mean, *spread], loss, steps=self.steps, learning_rate=self.learning_rate)
        return [(m.square() / (2 * s).exp()).detach()[0] for m, s in zip(mean, spread, strict=True)]


def divergence(mean: Sequence[Tensor], log_spread: Sequence[Tensor]) -> Tensor:
    """Mean over heads of the least KL(N(μ, σ²) ‖ N(0, s²)) over s, which is ½ log(1 + μ²/σ²)."""
    m, s = torch.cat(list(mean), -1), torch.cat(list(log_spread), -1)
    return (m.square() * (-2 * s).exp()).log1p().mean() / 2
