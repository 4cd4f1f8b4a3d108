"""The head geometry of one attention layer: a frozen value, made once. Nobody else divides by a number of heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.errors import ConfigError


@dataclass(frozen=True)
class HeadGeometry:
    """`heads` query heads of size `head_dim` in `kv_heads` groups (one key/value head each) of equal size.

    Shapes in this project: B batch rows, T tokens, H query heads, G groups, Q query heads of a group, D head size.
    """

    unit: ClassVar[str] = "head"
    protected: ClassVar[int] = 0

    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} heads in {self.kv_heads} groups of head size {self.head_dim} make no geometry; all "
                "three must be at least 1 and the heads a multiple of the groups"
            )

    @property
    def count(self) -> int:
        """Units that can be kept or pruned: the query heads."""
        return self.heads

    @property
    def default_bucket(self) -> int:
        """What counts are rounded up to unless something else is asked for: an eighth of the heads."""
        return max(1, self.heads // 8)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head (1 in multi-head attention)."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of the output projection's input: H · D."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys (and of the values) of one token: G · D."""
        return self.kv_heads * self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """`(..., H·D)` → `(..., H, D)`."""
        split: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return split

    def by_group(self, x: Tensor) -> Tensor:
        """`(..., H)` → `(..., G, Q)`."""
        grouped: Tensor = x.unflatten(-1, (self.kv_heads, self.queries_per_group))
        return grouped

    def group_of(self, heads: Tensor) -> Tensor:
        """Group index of each head index, same shape."""
        return heads // self.queries_per_group

    def columns(self, heads: Tensor) -> Tensor:
        """`(k,)` head (or group) indices → `(k·D,)` indices of their rows in a projection."""
        if self.head_dim == 1:
            return heads
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()

    def kept(self, heads: int, kv_heads: int) -> "HeadGeometry":
        """The geometry that is left when `heads` query heads in `kv_heads` groups are kept."""
        return HeadGeometry(heads, kv_heads, self.head_dim)

    def kept_by(self, keep: Tensor) -> "HeadGeometry | None":
        """The geometry that one decision (H,) leaves; None unless every kept group keeps the same number of heads."""
        per_group = self.by_group(keep > 0).sum(-1)
        counts = per_group[per_group > 0].unique()
        if len(counts) != 1:
            return None
        groups = int((per_group > 0).sum())
        return self.kept(groups * int(counts), groups)

    def rectangle(self, scores: Tensor, bucket: int | None = None) -> Tensor:
        """Scores (B, H), above 0 = requested → keep (B, H), boolean, regular in shape and never empty.

        A row keeps its groups with at least one requested head (rounded up to the bucket, best groups first), and in
        each of them the same number of query heads: as many as hold the requested heads on average (rounded up, best
        heads first). In multi-head attention, where a group is a head: the requested heads, rounded up to the bucket.
        """
        bucket = bucket or self.default_bucket
        if self.queries_per_group == 1:
            counts = round_up((scores > 0).sum(-1).clamp(min=1), bucket).clamp(max=self.heads)
            return rank(scores) < counts[:, None]
        grouped = self.by_group(scores)  # (B, G, Q)
        best = grouped.amax(-1)  # (B, G)
        groups_with_any = (best > 0).sum(-1).clamp(min=1)
        requested = (scores > 0).sum(-1).clamp(min=1)
        groups = round_up(groups_with_any, max(1, bucket // self.queries_per_group)).clamp(max=self.kv_heads)
        queries = -(-requested // groups_with_any)
        queries = round_up(queries, max(1, bucket // self.kv_heads)).clamp(max=self.queries_per_group)
        kept_groups = rank(best) < groups[:, None]
        kept_queries = rank(grouped) < queries[:, None, None]
        return (kept_groups[..., None] & kept_queries).flatten(-2)

    def row_shape(self, keep: Tensor) -> "RowShape":
        """Decisions (..., B, H) → the smallest regular shape that holds every row's own heads."""
        grouped = self.by_group(keep > 0)  # (..., B, G, Q)
        in_use = grouped.any(-1)
        count = int(in_use.sum(-1).max())
        groups = true_first(in_use)[..., :count]  # (B, g)
        return self.filled(grouped, groups, int(grouped.sum(-1).max()))

    def filled(self, grouped: Tensor, groups: Tensor, queries: int) -> "RowShape":
        """Of decisions (..., B, G, Q): `queries` heads in each of the `groups` (..., B, g), kept ones first."""
        size = self.queries_per_group
        chosen = grouped.gather(-2, groups[..., None].expand(*groups.shape, size))  # (..., B, g, Q)
        order = true_first(chosen)[..., :queries]
        heads = (groups[..., None] * size + order).flatten(-2)
        return RowShape(groups, heads, grouped.flatten(-2).gather(-1, heads))


@dataclass(frozen=True)
class RowShape:
    """Each row's groups (B, g), its query heads in them (B, g·q), and which of those its decision keeps (B, g·q).

    A row that needs fewer than g groups or q heads is filled up with heads that stay gated off.
    """

    groups: Tensor
    heads: Tensor
    kept: Tensor

    @property
    def queries_per_group(self) -> int:
        """q, the query heads in each of a row's groups."""
        return self.heads.shape[-1] // self.groups.shape[-1]


def true_first(x: Tensor) -> Tensor:
    """Indices along the last dimension, those of true values first, otherwise in order."""
    if x.shape[-1] == 1:  # one query head in every group: nothing to sort
        return torch.zeros_like(x, dtype=torch.long)
    return (~x).to(torch.uint8).argsort(dim=-1, stable=True)


def rank(scores: Tensor) -> Tensor:
    """0 for the best along the last dimension; ties go to the lower index."""
    if scores.shape[-1] == 1:
        return torch.zeros_like(scores, dtype=torch.long)
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def round_up(counts: Tensor, multiple: int) -> Tensor:
    """Counts rounded up to the next multiple."""
    return -(-counts // multiple) * multiple
