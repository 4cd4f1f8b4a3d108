"""Keep patterns to measure: rectangles at a keep ratio, and what of every projection such a pattern leaves in use."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from microglia.compact import row_rectangle
from microglia.errors import ConfigError
from microglia.geometry import HeadGeometry
from microglia.policy import AgentPolicy
from microglia.sites import Site
from microglia.sites.layouts import in_features, out_features


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
        best_groups = torch.rand(rows, geometry.kv_heads, generator=generator).argsort(-1) < groups
        best = (
            torch.rand(rows, geometry.kv_heads, geometry.queries_per_group, generator=generator).argsort(-1) < queries
        )
        keeps.append((best & best_groups[..., None]).flatten(-2).float())
    return keeps


class PatternPolicy(AgentPolicy):
    """Untrained agents that are asked like trained ones, at the same cost, and then overruled by a fixed pattern."""

    def __init__(self, geometries: Sequence[HeadGeometry], keep: Sequence[Tensor]) -> None:
        super().__init__(geometries)
        self.keep = [k * 2 - 1 for k in keep]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        asked = super().forward(features)
        return [k.to(logits).expand_as(logits) for k, logits in zip(self.keep, asked, strict=True)]


def kept_counts(site: Site, keep: Tensor) -> tuple[int, int]:
    """Query heads and groups that every row of a keep (B, H) holds once it is compacted."""
    groups, heads, _ = row_rectangle(keep > 0, site.geometry)
    return heads.shape[1], groups.shape[1]


def is_shared(keep: Sequence[Tensor]) -> bool:
    """Whether all rows agree on every site, so that they can share compact weights."""
    return all(bool((k == k[:1]).all()) for k in keep)


def kept_shares(site: Site, keep: Tensor) -> Iterator[tuple[nn.Module, int, int, bool]]:
    """Of every projection: itself, its kept rows or columns, all of them, and whether these are inputs (columns)."""
    groups, heads, _ = row_rectangle(keep[:1] > 0, site.geometry)
    for cut in site.layout.cuts(site.geometry, heads[0], groups[0]):
        projection = getattr(site.attention, cut.projection)
        whole = in_features(projection) if cut.of_inputs else out_features(projection)
        yield projection, len(cut.index), whole, cut.of_inputs
