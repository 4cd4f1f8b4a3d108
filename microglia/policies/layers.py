"""One agent per layer: it sees what is measured at the layer's heads, channels and sublayers, and decides about all."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from microglia.policies.agents import Agent, LearnedPolicy, MicrogliaAgent
from microglia.policies.base import POLICIES
from microglia.units import Geometry


@POLICIES.register("layers")
class LayerPolicy(LearnedPolicy):
    """One MicrogliaAgent of `hidden_dim` per layer; sites of each kind come in order of depth, one a layer."""

    name: ClassVar[str] = "layers"
    describes: ClassVar[str] = "input-adaptive agents, one per layer for all its units"
    default_hidden_dim: ClassVar[int] = 128

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        hidden_dim: int | None = None,
        signals: Sequence[str] = ("norm", "entropy"),
    ) -> None:
        kinds = list(dict.fromkeys(geometry.unit for geometry in geometries))
        sites = [[i for i, geometry in enumerate(geometries) if geometry.unit == kind] for kind in kinds]
        self.layers: list[list[int]] = [list(layer) for layer in zip(*sites, strict=True)]  # indices of their sites
        self.counts = [geometry.count for geometry in geometries]
        super().__init__(geometries, hidden_dim=hidden_dim, signals=signals)

    def _agents(self, units: Sequence[int], features: Sequence[int]) -> list[Agent]:
        def total(sizes: Sequence[int], layer: Sequence[int]) -> int:
            return sum(sizes[index] for index in layer)

        return [self._agent(total(units, layer), total(features, layer), 0) for layer in self.layers]

    def _agent(self, units: int, site_features: int, all_features: int) -> Agent:
        return MicrogliaAgent(units=units, features=site_features, hidden_dim=self.hidden_dim)

    def start_from(self, logits: Sequence[Tensor], *, limit: float = float("inf")) -> None:
        super().start_from([torch.cat([logits[i] for i in layer]) for layer in self.layers], limit=limit)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for agent, layer in zip(self.agents, self.layers, strict=True):
            logits = agent(torch.cat([self.standardised(i, features[i]) for i in layer], -1))
            found |= dict(zip(layer, logits.split([self.counts[i] for i in layer], -1), strict=True))
        return [found[index] for index in range(len(self.counts))]
