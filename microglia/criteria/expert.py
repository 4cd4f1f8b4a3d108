"""Heads as experts: how often a trained router calls them, frozen into one mask."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import Criterion
from microglia.criteria.calibration import Calibration
from microglia.criteria.trained import RECIPE, Agents
from microglia.gate import Gate
from microglia.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Expert(Criterion):
    """Share of the prompts for which trained agents keep the head; equal shares are told apart by the mean gate."""

    config: TrainingConfig = RECIPE
    hidden_dim: int = 128

    name: ClassVar[str] = "expert"
    score: ClassVar[str] = "share of prompts that a trained router sends to the head"
    paper: ClassVar[str] = "Su et al. 2025, SHRP; Peng et al. 2020, a mixture of h − 1 heads"
    departs: ClassVar[str] = "the router is the agents, per prompt and not per token; the model is frozen"

    def scores(self, calibration: Calibration) -> list[Tensor]:
        router = Agents(config=self.config, hidden_dim=self.hidden_dim).look_at(calibration)
        gate = Gate(bucket=calibration.bucket)
        logits = calibration.logits(router)
        keep = gate.every(logits, calibration.geometries)
        return [usage(k, x) for k, x in zip(keep, logits, strict=True)]


def usage(keep: Tensor, logits: Tensor) -> Tensor:
    """Number of prompts that keep each head, plus the mean soft gate in (0, 1): (N, H) twice → (H,)."""
    return keep.sum(0) + torch.sigmoid(logits).mean(0)
