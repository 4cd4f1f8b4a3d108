"""Keep patterns to measure: random rectangles of heads at a keep ratio, and a policy that decides on one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.policies import AgentPolicy


def counts_at(geometry: HeadGeometry, keep_ratio: float) -> tuple[int, int]:
    """Groups and query heads per group whose product comes closest to the ratio; of several, the fewest groups."""
    if not 0 < keep_ratio <= 1:
        raise ConfigError(f"keep_ratio={keep_ratio} was given; it must be above 0 and at most 1")
    return min(
        ((g, q) for g in range(1, geometry.kv_heads + 1) for q in range(1, geometry.queries_per_group + 1)),
        key=lambda count: (abs(count[0] * count[1] - keep_ratio * geometry.heads), count[0]),
    )


def random_keep(geometries: Sequence[HeadGeometry], keep_ratio: float, *, rows: int = 1, seed: int = 0) -> list[Tensor]:
    """Random rectangles of the same counts in every row and, for equal geometries, every site: keep (rows, H) per site.

    Equal counts hit the ratio exactly, so that two runs measure the same number of bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for geometry in geometries:
        groups, queries = counts_at(geometry, keep_ratio)
        shape = rows, geometry.kv_heads, geometry.queries_per_group
        best_groups = torch.rand(shape[:2], generator=generator).argsort(-1) < groups
        best = torch.rand(shape, generator=generator).argsort(-1) < queries
        keeps.append((best & best_groups[..., None]).flatten(-2).float())
    return keeps


class PatternPolicy(AgentPolicy):
    """Untrained agents that run like trained ones, at the same cost, and are then overruled by a fixed pattern."""

    def __init__(self, geometries: Sequence[HeadGeometry], keep: Sequence[Tensor]) -> None:
        super().__init__(geometries)
        self.pattern = [k * 2 - 1 for k in keep]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        logits = super().forward(features)
        return [fixed.to(x).expand_as(x) for fixed, x in zip(self.pattern, logits, strict=True)]
