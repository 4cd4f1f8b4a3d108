"""MLPs of a captured step: the few numbers of channels that they have, compact weights, and where channels stand.

As with heads, a decision of any size is laid out in a bucket: the kept channels first, in the order of the file, then
others, which add exactly nothing: their columns of the down projection are zero. Where rows differ, the bucket holds
what any of them keeps, and each row's own gate acts on it; where that is nearly everything, on the model's own weights.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microglia.anatomy import Layer
from microglia.anatomy.geometry import true_first
from microglia.anatomy.projection import weight_dim
from microglia.execution.captured import kernels
from microglia.execution.captured.moves import Copy, Moves, copies_of_units
from microglia.execution.captured.weights import CompactProjections
from microglia.units import ChannelGeometry, ChannelSite

STEPS = 8  # buckets lie an eighth of the channels apart
SHORTEST = 64  # bytes in a row of a run: of shorter ones a kernel that copies run by run would mostly wait


@dataclass(frozen=True)
class MlpShape:
    """How many channels an MLP has in a step, and who keeps them.

    `shared`: compact weights, for rows that agree. `rows`: the same with what any row keeps, gated by each row's
    decision. `masked`: every channel, the model's own weights, gated.
    """

    kind: Literal["masked", "shared", "rows"]
    channels: int

    @property
    def is_cut(self) -> bool:
        """Whether channels must be copied before it runs."""
        return self.kind != "masked"

    @property
    def is_gated(self) -> bool:
        """Whether each row multiplies its channels by its own decision."""
        return self.kind != "shared"


def channel_buckets(channels: int, granule: int, lowest: float) -> tuple[int, ...]:
    """Numbers of channels, all of them first, down to the share `lowest`: whole granules, which kernels like."""
    counts = range(STEPS, max(1, math.ceil(lowest * STEPS)) - 1, -1)
    sizes = (min(channels, -(-channels * count // (STEPS * granule)) * granule) for count in counts)
    return tuple(dict.fromkeys(sizes))


class ChannelWeights(CompactProjections[int]):
    """The projections of one MLP with the channels of the present decision."""

    def __init__(self, layer: Layer, every: Sequence[int]) -> None:
        self.layer, self.channels = layer, every[0]
        cuts = {size: layer.family.mlp.cuts(every[0], torch.arange(size)) for size in every[1:]}
        super().__init__(layer.mlp, layer.mlp_name, cuts)

    def gather(self, size: int, run: int, runs: Tensor, kept: Tensor) -> None:
        """Copy `size` channels in `runs` (size/run,) of `run` neighbours; kept (size/run,) is 0 for what fills up."""
        now = self.layer.family.mlp.cuts(self.channels // run, runs)  # in runs: much faster than one by one
        self.select(self.cuts[size], [cut.index for cut in now], run, kept)

    def copies(self, size: int, run: int, at: int, kept_at: int) -> list[Copy] | None:
        """What `gather` copies, as data: where in the slots the first run stands, and whether it is kept.

        None for weights in pieces, and runs too short to be copied one by one.
        """
        mlp, count = self.layer.family.mlp, self.channels // run
        slots = torch.arange(size // run)
        first, numbered = mlp.cuts(count, torch.zeros_like(slots)), mlp.cuts(count, slots)
        found: list[Copy] = []
        for cut, start, number in zip(self.cuts[size], first, numbered, strict=True):
            inner, places = self._inner(cut.projection), (number.index - start.index).tolist()
            units = [
                (at + place, begin, kept_at + place if cut.of_inputs else -1)
                for place, begin in zip(places, start.index.tolist(), strict=True)
            ]
            for part, dim in (("weight", weight_dim(inner, of_inputs=cut.of_inputs)), ("bias", 0)):
                target = self.view(cut, part)
                if target is None:
                    continue
                source = getattr(inner, part).detach()
                if not source.is_contiguous() or run * source.element_size() < SHORTEST:
                    return None
                found += copies_of_units(source, target, dim, run, units)
        return found


@dataclass(frozen=True, eq=False)
class Layout:
    """How the channel sites of a pruner lie in the MLPs.

    run: channels that go or stay together, copied at once. block_of: (L, R), the block of every run in every layer.
    """

    sites: Sequence[ChannelSite]
    run: int
    block_of: Tensor

    @property
    def block(self) -> int:
        """Channels of a block."""
        return self.sites[0].geometry.block

    @classmethod
    def of(cls, sites: Sequence[ChannelSite], granule: int, device: torch.device) -> "Layout":
        """The runs are those that all sites and all buckets, which are whole granules, have in common."""
        run = math.gcd(granule, *(site.run for site in sites))
        return cls(sites, run, torch.stack([site.block_of[::run] for site in sites]).to(device))

    def fits(self, sites: Sequence[ChannelSite]) -> bool:
        """Whether other sites have the same blocks; a pruner makes new sites for every request."""
        pairs = list(zip(self.sites, sites, strict=True))
        return all(
            ours.geometry.block == theirs.geometry.block and ours.order is theirs.order for ours, theirs in pairs
        )


class Mlps:
    """The MLPs of a model. Their compact weights are reserved at the first decision about channels."""

    def __init__(self, layers: Sequence[Layer], lowest: float) -> None:
        """lowest: the smallest bucket as a share of the channels."""
        self.layers, self.lowest = layers, lowest
        self._layout: Layout | None = None

    @functools.cached_property
    def geometry(self) -> ChannelGeometry:
        """Of every MLP, as it stands in the file."""
        return ChannelSite.in_layer(0, self.layers[0]).geometry

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of channels that compact MLPs may have, all of them first."""
        return channel_buckets(self.geometry.channels, self.geometry.block, self.lowest)

    @functools.cached_property
    def weights(self) -> list[ChannelWeights]:
        """Of every layer. First asked for by `reserve`, since nothing may be made within a capture."""
        with torch.inference_mode(False):
            return [ChannelWeights(layer, self.buckets) for layer in self.layers]

    def reserve(self) -> None:
        """Make what decisions about channels need. Raises MicrogliaError where the weights cannot be cut."""
        _ = self.weights

    def layout(self, sites: Sequence[ChannelSite]) -> Layout:
        """How these sites lie in the MLPs; found once for requests of the same pruner."""
        if self._layout is None or not self._layout.fits(sites):
            device = next(self.layers[0].mlp.parameters()).device
            self._layout = Layout.of(sites, self.geometry.block, device)
        return self._layout

    def shape(self, keep: Tensor, block: int, *, masked: bool = False) -> MlpShape | None:
        """The shape for decisions (L, B, U) of some layers about blocks of so many channels; None for the model's own.

        All on the host. masked: every channel is still computed.
        """
        kept = keep > 0
        if bool(kept.all()):
            return None
        most = int(kept.any(1).sum(-1).max()) * block
        size = min(size for size in self.buckets if size >= most)
        if masked or size == self.buckets[0]:
            return MlpShape("masked", self.buckets[0])
        return MlpShape("shared" if bool((kept == kept[:, :1]).all()) else "rows", size)


class ChannelBuffers:
    """Static tensors that hold a decision about channels, of every layer, for `batch` rows.

    slots: (2, L, I), of which the first R count: where the runs of channels stand, and whether any row keeps them.
    kept: the latter as weights are stored. gates: (L, B, 1, I), each row's own decision in that order. bias:
    (L, B, 1, hidden), what pruned channels leave behind; None where they leave nothing.
    """

    def __init__(self, mlps: Mlps, batch: int, bias: Tensor | None) -> None:
        """bias: a template (B, 1, hidden)."""
        self.mlps, count, channels = mlps, len(mlps.layers), mlps.geometry.channels
        like = next(mlps.layers[0].mlp.parameters())
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, device=like.device)
            self.slots = zeros(2, count, channels, dtype=torch.long)
            self.kept = zeros(count, channels, dtype=like.dtype)
            self.gates = zeros(count, batch, 1, channels, dtype=like.dtype)
            self.bias = None if bias is None else [torch.zeros_like(bias) for _ in range(count)]

    def reset(self) -> None:
        """Numbers of runs that every layout has."""
        self.slots.zero_()

    def gate(self, layer: int, shape: MlpShape) -> Tensor | None:
        """(B, 1, k) by which the channels of a layer are multiplied in a step of this shape: a view; None for none."""
        return self.gates[layer][..., : shape.channels] if shape.is_gated else None

    def switch(self, layers: range, size: int, run: int) -> Callable[[], None]:
        """What copies the channels of these layers' decisions into their compact weights.

        One launch of a kernel where there is one that can make it.
        """
        count, weights = size // run, self.mlps.weights
        if kernels.usable(self.slots.device):
            runs_at, kept_at = (part * self.slots[0].numel() for part in range(2))
            width = self.slots.shape[2]
            copies = (weights[at].copies(size, run, runs_at + at * width, kept_at + at * width) for at in layers)
            if (moves := Moves.of(copies, self.slots)) is not None:
                return moves.make

        def gather() -> None:
            for at in layers:
                weights[at].gather(size, run, self.slots[0, at, :count], self.kept[at, :count])

        return gather

    def write(self, keep: Tensor, layout: Layout, in_place: Sequence[bool]) -> None:
        """Decisions (L, B, U). in_place: of each layer, whether its channels stand as they do in the model.

        On the device, for all layers together: their order is a sort, which a host would copy there for a millisecond.
        """
        blocks, run = layout.block_of, layout.run
        count = blocks.shape[1]
        kept = (keep > 0).any(1).gather(1, blocks)  # (L, R)
        still = torch.tensor(in_place, device=keep.device)[:, None]
        order = torch.where(still, torch.arange(count, device=keep.device), true_first(kept))
        self.slots[0, :, :count].copy_(order)
        self.slots[1, :, :count].copy_(kept.gather(1, order))
        self.kept.copy_(self.slots[1])
        rows = blocks.gather(1, order)[:, None].expand(-1, keep.shape[1], -1)  # (L, B, R)
        self.gates.squeeze(2).unflatten(-1, (count, run)).copy_(keep.gather(2, rows)[..., None])

    def leave(self, sites: Sequence[ChannelSite], keep: Tensor, fill: Sequence[Tensor | None]) -> None:
        """What the channels outside keep (L, B, U) leave behind: fill (B, U, …) of every site."""
        for target, site, k, f in zip(self.bias or (), sites, keep, fill, strict=False):
            if f is not None:
                target.copy_(site.fill_bias(k, f))
