"""The few shapes that captured steps have, and how a decision of any shape is laid out in one of them.

Every site of every prompt may keep another number of heads. One captured step per combination of counts would be
combinatorial, one count for the whole step would be dense as soon as a single site keeps everything. So the layers are
captured in *blocks* of a few neighbours, each once per bucket, and a step replays one graph per block: the number of
captures is buckets times blocks, which together run the model once per bucket, and every block has its own bucket. A
site that needs less than its bucket is filled up with heads that add exactly nothing: their columns of the output
projection are zero (shared decisions) or their outputs are multiplied by zero (rows that decide for themselves).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.anatomy import HeadGeometry, RowShape
from microglia.anatomy.geometry import true_first
from microglia.errors import ConfigError


@dataclass(frozen=True)
class Bucket:
    """A regular shape: so many groups, and in each of them so many query heads."""

    groups: int
    queries: int

    @property
    def heads(self) -> int:
        return self.groups * self.queries


def buckets(geometry: HeadGeometry, lowest: float = 0.5) -> tuple[Bucket, ...]:
    """All buckets of a geometry, the full one first: 32/28/24/20/16 of 32 heads, down to the share `lowest`.

    Under grouped-query attention every number of groups meets every number of query heads in them.
    """
    if not 0 < lowest <= 1:
        raise ConfigError(f"lowest={lowest} was given; the smallest bucket must be above 0 and at most 1")
    groups, queries = (_counts(n, lowest) for n in (geometry.kv_heads, geometry.queries_per_group))
    return tuple(Bucket(g, q) for g in groups for q in queries)


def _counts(most: int, lowest: float) -> range:
    return range(most, max(1, -int(-most * lowest // 1)) - 1, -max(1, most // 8))


def covering(every: Sequence[Bucket], groups: int, queries: int) -> Bucket:
    """The smallest bucket with at least so many groups and query heads per group; the full one covers everything."""
    fitting = [bucket for bucket in every if bucket.groups >= groups and bucket.queries >= queries]
    return min(fitting, key=lambda bucket: (bucket.heads, bucket.groups))


@dataclass(frozen=True)
class SlotMap:
    """Where the heads of decisions live in a bucket of g groups and q query heads in each.

    groups: (…, B, g), the group in each slot. heads: (…, B, g·q), the query heads in order. kept: (…, B, g·q), which of
    them the decision keeps; the rest fills up. source, target: (…, B, M), groups to move and the slots that they move
    to, counted as the cache stores them: group·B + b.
    """

    groups: Tensor
    heads: Tensor
    kept: Tensor
    source: Tensor
    target: Tensor

    @property
    def shape(self) -> RowShape:
        """Groups, heads and which are kept, as attention of own heads needs them."""
        return RowShape(self.groups, self.heads, self.kept)

    def packed(self) -> Tensor:
        """All of it in one tensor (…, B, N) of integers, so that it reaches a device in one copy."""
        return torch.cat([self.groups, self.heads, self.kept.long(), self.source, self.target], dim=-1)

    @staticmethod
    def unpacked(packed: Tensor, geometry: HeadGeometry, bucket: Bucket) -> "SlotMap":
        """Views of what was packed; there may be more behind it."""
        sizes = _sizes(geometry, bucket)
        return SlotMap(*packed[..., : sum(sizes)].split(sizes, dim=-1))


def packed_size(geometry: HeadGeometry, every: Sequence[Bucket]) -> int:
    """The largest N of `SlotMap.packed`."""
    return max(sum(_sizes(geometry, bucket)) for bucket in every)


def _sizes(geometry: HeadGeometry, bucket: Bucket) -> list[int]:
    moves = min(bucket.groups, geometry.kv_heads - bucket.groups)
    return [bucket.groups, bucket.heads, bucket.heads, moves, moves]


def slot_map(keep: Tensor, geometry: HeadGeometry, bucket: Bucket) -> SlotMap:
    """Decisions (…, B, H) → where their heads live. Shapes depend on the bucket only.

    A kept group below g stays in its slot; one above moves to a slot below that is free. So at most min(g, G - g)
    groups of the cache are copied, none of them onto another that is kept, and doing it twice changes nothing.
    """
    count, batch = bucket.groups, keep.shape[-2]
    if batch > 1 and bool((keep == keep[..., :1, :]).all()):  # found once, for all rows
        one = slot_map(keep[..., :1, :], geometry, bucket)
        row = torch.arange(batch, device=keep.device)[:, None]
        size = *keep.shape[:-1], -1
        groups, heads, kept = (x.expand(size) for x in (one.groups, one.heads, one.kept))
        return SlotMap(groups, heads, kept, one.source * batch + row, one.target * batch + row)
    grouped = geometry.by_group(keep > 0)  # (…, B, G, Q)
    in_use = grouped.any(-1)
    staying, coming = in_use[..., :count], in_use[..., count:]
    moves = min(count, coming.shape[-1])
    target = true_first(~staying)[..., :moves]
    source = true_first(coming)[..., :moves] + count
    order = torch.arange(moves, device=keep.device)
    real = (order < (~staying).sum(-1, keepdim=True)) & (order < coming.sum(-1, keepdim=True))
    source = torch.where(real, source, target)
    groups = torch.arange(count, device=keep.device).expand(staying.shape).scatter(-1, target, source)
    shape = geometry.filled(grouped, groups, bucket.queries)
    row = torch.arange(batch, device=keep.device)[:, None]
    return SlotMap(groups, shape.heads, shape.kept, source * batch + row, target * batch + row)
