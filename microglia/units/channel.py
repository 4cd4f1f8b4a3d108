"""MLP channels, in blocks: a row of gate and up (or of the one that there is) and a column of down each.

A permutation of a layer's channels changes nothing, so blocks are cut from any order: in the order of the file a block
holds channels that matter and others, ordered by their statistics those that matter alike.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import Layer
from microglia.anatomy.geometry import rank, round_up
from microglia.anatomy.projection import features
from microglia.errors import ConfigError, UnsupportedModelError
from microglia.units.arrangement import BLOCK, Arrangement
from microglia.units.costs import UnitCosts
from microglia.units.site import ProjectedSite, check_rows, limited

FEWEST = 8  # blocks that a layer has at least, where its channels can be divided so


@dataclass(frozen=True)
class ChannelGeometry:
    """`channels` of one MLP in blocks of `block`, the first `protected` of which are always kept."""

    unit: ClassVar[str] = "channel"

    channels: int
    block: int
    protected: int = 0

    def __post_init__(self) -> None:
        if min(self.channels, self.block) < 1 or self.channels % self.block or not 0 <= self.protected <= self.count:
            raise ConfigError(
                f"{self.channels} channels in blocks of {self.block}, {self.protected} of them protected, make no "
                "geometry; the channels must be a multiple of the block"
            )

    @classmethod
    def divided(cls, channels: int, block: int = BLOCK, shared: float = 0.0) -> "ChannelGeometry":
        """In the largest blocks up to `block` that leave at least eight of them; a share of them protected."""
        most = min(block, max(1, channels // FEWEST))
        size = next(size for size in range(most, 0, -1) if channels % size == 0)
        return cls(channels, size, round(shared * (channels // size)))

    @property
    def count(self) -> int:
        """Units that can be kept or pruned: the blocks."""
        return self.channels // self.block

    @property
    def default_bucket(self) -> int:
        """What counts are rounded up to unless something else is asked for: an eighth of the blocks."""
        return max(1, self.count // 8)

    def rectangle(self, scores: Tensor, bucket: int | None = None) -> Tensor:
        """Scores (B, U), above 0 = requested → keep (B, U), boolean: the best, as many as requested, rounded up."""
        scores = torch.cat([torch.full_like(scores[:, : self.protected], torch.inf), scores[:, self.protected :]], -1)
        requested = (scores > 0).sum(-1).clamp(min=1)
        kept = round_up(requested, bucket or self.default_bucket).clamp(max=self.count)
        return rank(scores) < kept[:, None]


@dataclass(frozen=True, eq=False)
class ChannelSite(ProjectedSite):
    """The channels of one MLP. order: a permutation (I,) of them from which the blocks are cut, None as they stand."""

    geometry_type: ClassVar[type] = ChannelGeometry

    geometry: ChannelGeometry
    order: Tensor | None = None

    @classmethod
    def in_layer(cls, index: int, layer: Layer) -> "ChannelSite":
        if missing := [name for name in layer.family.mlp.projections if not hasattr(layer.mlp, name)]:
            raise UnsupportedModelError(
                f"{layer.mlp_name} is a {type(layer.mlp).__name__} without {', '.join(missing)}, so its channels are "
                "not known; decide about units='head' only"
            )
        return cls(index, layer, ChannelGeometry.divided(features(layer.down, of_inputs=True)))

    def arranged(self, arrangement: Arrangement, layers: int) -> "ChannelSite":
        channels = self.geometry.channels
        geometry = ChannelGeometry.divided(channels, arrangement.block, arrangement.shared)
        return replace(self, geometry=geometry, order=arrangement.order(self.layer.index, channels))

    @property
    def name(self) -> str:
        return self.layer.mlp_name

    @property
    def holder(self) -> nn.Module:
        return self.layer.mlp

    @property
    def projections(self) -> tuple[str, ...]:
        return self.layer.family.mlp.projections

    # --- where the channels of a block stand --------------------------------------------------------------------------

    def split(self, x: Tensor) -> Tensor:
        ordered = x if self.order is None else x.index_select(-1, self.order.to(x.device))
        split: Tensor = ordered.unflatten(-1, (self.geometry.count, self.geometry.block))
        return split

    def joined(self, parts: Tensor) -> Tensor:
        ordered = parts.flatten(-2)
        return ordered if self.order is None else ordered.index_select(-1, self.order.argsort().to(parts.device))

    @cached_property
    def block_of(self) -> Tensor:
        """The block of every channel, (I,)."""
        blocks = torch.arange(self.geometry.channels) // self.geometry.block
        return blocks if self.order is None else blocks[self.order.argsort()]

    @cached_property
    def run(self) -> int:
        """How many neighbouring channels always go or stay together: they are copied at once."""
        block = self.geometry.block
        if self.order is None:
            return block
        for size in (size for size in range(block, 1, -1) if block % size == 0):
            runs = self.order.view(-1, size)
            if bool((runs[:, 0] % size == 0).all()) and runs.equal(runs[:, :1] + torch.arange(size)):
                return size
        return 1

    def channels_of(self, keep: Tensor) -> Tensor:
        """The channels (k,) of the blocks that keep (U,) holds, in the order of the file."""
        return keep[self.block_of.to(keep.device)].nonzero().flatten()

    # --- gates and cuts -----------------------------------------------------------------------------------------------

    def gate(self, keep: Tensor, where: Tensor | None, fill: Tensor | None) -> Callable[..., Any]:
        block_of, left = self.block_of.to(keep.device), None if fill is None else self.joined(fill)[:, None]

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            check_rows(self, len(x), len(keep))
            # (B, 1, I), made here: gates are put on where no gradient is kept.
            factor = limited(keep[:, block_of][:, None].to(x), where)
            return (x * factor if left is None else x * factor + (1 - factor) * left.to(x), *inputs[1:])

        return hook

    def cut(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        self.cut_out(stack, self.layer.family.mlp.cuts(self.geometry.channels, self.channels_of(keep)), self.run)

    def cut_rows(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        """What any row keeps is read once for all of them; each row's own gates act on it."""
        together = keep.any(0)
        if not bool(together.all()):
            self.cut(stack, together, cache)
        if bool((keep == together).all()):
            return
        gate = keep[:, self.block_of.to(keep.device)[self.channels_of(together)]][:, None]  # (B, 1, k)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            check_rows(self, len(inputs[0]), len(gate))
            return (inputs[0] * gate.to(inputs[0]), *inputs[1:])

        stack.callback(self.output.register_forward_pre_hook(hook).remove)

    def filled(self, stack: ExitStack, keep: Tensor, fill: Tensor) -> None:
        bias = self.fill_bias(keep, fill)

        def add(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + bias

        stack.callback(self.holder.register_forward_hook(add, prepend=True).remove)

    # --- cost ---------------------------------------------------------------------------------------------------------

    def cut_sizes(self, keep: Tensor) -> Iterator[tuple[nn.Module, int, bool]]:
        kept = torch.arange(int((keep > 0).sum()) * self.geometry.block)
        for one in self.layer.family.mlp.cuts(self.geometry.channels, kept):
            yield getattr(self.holder, one.projection), len(one.index), one.of_inputs

    def costs(self, kv: float) -> UnitCosts:
        count = self.geometry.count
        whole = self.saved_bytes(torch.zeros(1, count))
        return UnitCosts.of_units(torch.full((count,), whole / count, dtype=torch.float64))

    def read_by(self, keep: Tensor) -> Tensor:
        return keep.amax(0, keepdim=True)
