"""A predictor: one MLP that scores every unit of every site from the first site's features."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from microglia.policies.agents import MicrogliaAgent
from microglia.policies.base import POLICIES, Policy, Standardiser
from microglia.signals import feature_size
from microglia.units import Geometry


@POLICIES.register("predictor")
class PredictorPolicy(Policy):
    """One MLP of `hidden_dim` that decides on all sites from the statistics of a prompt at the first."""

    name: ClassVar[str] = "predictor"
    describes: ClassVar[str] = "one input-adaptive predictor at the first site"

    def __init__(
        self, geometries: Sequence[Geometry], *, hidden_dim: int = 128, signals: Sequence[str] = ("norm", "entropy")
    ) -> None:
        super().__init__()
        self.signals, self.hidden_dim = tuple(signals), hidden_dim
        self.sizes = [g.count for g in geometries]
        size = feature_size(geometries[0], signals)
        self.agent = MicrogliaAgent(units=sum(self.sizes), features=size, hidden_dim=hidden_dim)
        self.statistics = Standardiser(size)

    @classmethod
    def create(cls, geometries: Sequence[Geometry], signals: Sequence[str], **options: Any) -> Self:
        return cls(geometries, signals=signals, **options)

    def options(self) -> dict[str, Any]:
        return {"hidden_dim": self.hidden_dim}

    @torch.no_grad()
    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        self.statistics.fit(features[0])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(self.agent(self.statistics(features[0])).split(self.sizes, -1))
