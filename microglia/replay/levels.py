"""The few shapes that captured steps have, and how a decision of any shape is laid out in one of them.

Every site of every prompt may keep another number of heads. One captured step per combination of counts would be
combinatorial, one count for the whole step would be dense as soon as a single site keeps everything. So the layers are
captured in *stretches* of a few neighbours, each once per level, and a step replays one graph per stretch: the number
of captures is levels times stretches, which together run the model once per level, and every stretch has its own level.
A site that asks for less than its level is filled up with heads that add exactly nothing: their columns of the output
projection are zero (shared decisions) or their outputs are multiplied by zero (rows that decide for themselves).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.geometry import HeadGeometry


@dataclass(frozen=True)
class Level:
    """A rectangle: so many groups, and in each of them so many query heads."""

    groups: int
    queries: int

    @property
    def heads(self) -> int:
        return self.groups * self.queries


def ladder(geometry: HeadGeometry, lowest: float = 0.5) -> tuple[Level, ...]:
    """All levels of a geometry, the full one first: 32/28/24/20/16 of 32 heads, down to the share `lowest`.

    Under grouped-query attention every number of groups meets every number of query heads in them.
    """
    if not 0 < lowest <= 1:
        raise ConfigError(f"lowest={lowest} was given; the smallest level must be above 0 and at most 1")
    groups, queries = (_counts(n, lowest) for n in (geometry.kv_heads, geometry.queries_per_group))
    return tuple(Level(g, q) for g in groups for q in queries)


def _counts(most: int, lowest: float) -> range:
    return range(most, max(1, -int(-most * lowest // 1)) - 1, -max(1, most // 8))


def covering(levels: Sequence[Level], groups: int, queries: int) -> Level:
    """The smallest level with at least so many groups and query heads per group; the full one covers everything."""
    fitting = [level for level in levels if level.groups >= groups and level.queries >= queries]
    return min(fitting, key=lambda level: (level.heads, level.groups))


@dataclass(frozen=True)
class Placement:
    """Where the heads of decisions live at a level of g groups and q query heads in each.

    slots: (…, B, g), the group in each place. heads: (…, B, g·q), the query heads in order. asked: (…, B, g·q), which
    of them were asked for; the rest fills up. source, target: (…, B, M), groups to move and the places that they move
    to, counted over all rows: b·G + group.
    """

    slots: Tensor
    heads: Tensor
    asked: Tensor
    source: Tensor
    target: Tensor

    def packed(self) -> Tensor:
        """All of it in one tensor (…, B, N) of integers, so that it reaches a device in one copy."""
        return torch.cat([self.slots, self.heads, self.asked.long(), self.source, self.target], dim=-1)

    @staticmethod
    def unpacked(packed: Tensor, geometry: HeadGeometry, level: Level) -> "Placement":
        """Views of what was packed; there may be more behind it."""
        sizes = _sizes(geometry, level)
        return Placement(*packed[..., : sum(sizes)].split(sizes, dim=-1))


def packed_size(geometry: HeadGeometry, levels: Sequence[Level]) -> int:
    """The largest N of `Placement.packed`."""
    return max(sum(_sizes(geometry, level)) for level in levels)


def _sizes(geometry: HeadGeometry, level: Level) -> list[int]:
    moves = min(level.groups, geometry.kv_heads - level.groups)
    return [level.groups, level.heads, level.heads, moves, moves]


def placed(keep: Tensor, geometry: HeadGeometry, level: Level) -> Placement:
    """Decisions (…, B, H) → where their heads live. Shapes depend on the level only.

    A kept group below g stays in its place; one above moves to a place below that is free. So at most min(g, G - g)
    groups of the cache are copied, none of them onto another that is kept, and doing it twice changes nothing.
    """
    kept, count, size = keep > 0, level.groups, geometry.queries_per_group
    grouped = geometry.by_group(kept)  # (…, B, G, Q)
    in_use = grouped.any(-1)
    stays, comes = in_use[..., :count], in_use[..., count:]
    moves = min(count, comes.shape[-1])
    target = _true_first(~stays)[..., :moves]
    source = _true_first(comes)[..., :moves] + count
    order = torch.arange(moves, device=keep.device)
    real = (order < (~stays).sum(-1, keepdim=True)) & (order < comes.sum(-1, keepdim=True))
    source = torch.where(real, source, target)
    slots = torch.arange(count, device=keep.device).expand(stays.shape).scatter(-1, target, source)
    chosen = grouped.gather(-2, slots[..., None].expand(*slots.shape, size))  # (…, B, g, Q)
    queries = _true_first(chosen)[..., : level.queries]
    heads = (slots[..., None] * size + queries).flatten(-2)
    first = torch.arange(keep.shape[-2], device=keep.device)[:, None] * geometry.kv_heads
    return Placement(slots, heads, kept.gather(-1, heads), first + source, first + target)


def _true_first(x: Tensor) -> Tensor:
    """Indices along the last dimension, those of true values first, otherwise in order."""
    return (~x).to(torch.uint8).argsort(dim=-1, stable=True)
