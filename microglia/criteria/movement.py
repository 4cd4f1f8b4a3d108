"""Movement: a head is kept when training pulls its weights away from zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, check_positive
from microglia.criteria.calibration import Calibration
from microglia.criteria.descent import turns
from microglia.errors import ConfigError


@CRITERIA.register("movement")
@dataclass(frozen=True, kw_only=True)
class Movement(Criterion):
    """A score per head, moved by −∂loss/∂W·W of its o slice while only the best heads are kept.

    As a head's output is linear in that slice, the product is ∂loss/∂keep. The kept share falls with the cube of the
    steps to go, from 1 to `keep_ratio`; pruned heads go on learning (straight-through) and may come back.
    """

    steps: int = 100
    keep_ratio: float = 0.75

    name: ClassVar[str] = "movement"
    examples: ClassVar[int] = 512
    score: ClassVar[str] = "Σ −∂loss/∂W·W of the head's o slice, while only the best heads are kept"
    paper: ClassVar[str] = "Sanh et al. 2020, movement pruning; Lagunas et al. 2021, in blocks"
    departs: ClassVar[str] = "the weights stay frozen; one score per head"

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, keep_ratio=self.keep_ratio)
        if self.keep_ratio > 1:
            raise ConfigError(f"keep_ratio={self.keep_ratio} was given; it must be above 0 and at most 1")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        sizes = [g.count for g in calibration.geometries]
        scores = torch.zeros(sum(sizes), device=calibration.device)
        for done, batch in turns(calibration, self.steps):
            share = self.keep_ratio + (1 - self.keep_ratio) * (1 - done) ** 3
            keep = torch.zeros_like(scores)
            keep[scores.topk(round(share * len(scores))).indices] = 1
            keep.requires_grad_()
            loss = calibration.losses(batch, keep[None].split(sizes, -1)).mean()
            scores -= torch.autograd.grad(loss, keep)[0]
        return list(scores.split(sizes))
