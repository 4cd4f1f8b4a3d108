"""Keep patterns to measure: random units at a keep ratio or a share of the bytes, and a policy that decides on one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from microglia.anatomy import HeadGeometry
from microglia.anatomy.geometry import rank
from microglia.errors import ConfigError
from microglia.policies import AgentPolicy
from microglia.units import Geometry, StepCosts


def counts_at(geometry: HeadGeometry, keep_ratio: float) -> tuple[int, int]:
    """Groups and query heads per group whose product comes closest to the ratio; of several, the fewest groups."""
    if not 0 < keep_ratio <= 1:
        raise ConfigError(f"keep_ratio={keep_ratio} was given; it must be above 0 and at most 1")
    return min(
        ((g, q) for g in range(1, geometry.kv_heads + 1) for q in range(1, geometry.queries_per_group + 1)),
        key=lambda count: (abs(count[0] * count[1] - keep_ratio * geometry.heads), count[0]),
    )


def random_keep(geometries: Sequence[Geometry], keep_ratio: float, *, rows: int = 1, seed: int = 0) -> list[Tensor]:
    """Random units of the same counts in every row and, for equal geometries, every site: keep (rows, U) per site.

    Of heads they are rectangles. Equal counts hit the ratio exactly, so that two runs measure the same number of bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for geometry in geometries:
        if not isinstance(geometry, HeadGeometry):
            scores = torch.rand(rows, geometry.count, generator=generator)
            scores[:, : geometry.protected] = 1
            count = max(1, geometry.protected, round(keep_ratio * geometry.count))
            keeps.append((rank(scores) < count).float())
            continue
        groups, queries = counts_at(geometry, keep_ratio)
        shape = rows, geometry.kv_heads, geometry.queries_per_group
        best_groups = torch.rand(shape[:2], generator=generator).argsort(-1) < groups
        best = torch.rand(shape, generator=generator).argsort(-1) < queries
        keeps.append((best & best_groups[..., None]).flatten(-2).float())
    return keeps


def keep_ratio_for(geometries: Sequence[Geometry], costs: StepCosts, byte_share: float) -> float:
    """The smallest keep ratio whose random units read at least this share of a dense step's bytes, to a thousandth.

    Raises ConfigError for a share that no ratio has.
    """

    def share(ratio: float) -> float:
        return float(costs.share(random_keep(geometries, ratio)))

    if not share(1e-3) <= byte_share <= 1:
        raise ConfigError(
            f"bytes={byte_share} was given; a step reads at most 1 and at least {share(1e-3):.3f} of the dense one's "
            "bytes when only what cannot go is kept"
        )
    low, high = 1, 1000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle / 1000) >= byte_share - 1e-6 else (middle + 1, high)
    return low / 1000


class PatternPolicy(AgentPolicy):
    """Untrained agents that run like trained ones, at the same cost, and are then overruled by a fixed pattern."""

    def __init__(
        self, geometries: Sequence[Geometry], keep: Sequence[Tensor], signals: Sequence[str] = ("norm", "entropy")
    ) -> None:
        super().__init__(geometries, signals=signals)
        self.pattern = [k * 2 - 1 for k in keep]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        logits = super().forward(features)
        return [fixed.to(x).expand_as(x) for fixed, x in zip(self.pattern, logits, strict=True)]
