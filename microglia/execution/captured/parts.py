"""A decision about any units, laid out layer by layer, and the parts that a step is put together from for it.

A part is a block of neighbouring layers with the shapes that they are captured for. A block falls apart into its layers
where one of them loses a sublayer: a layer then has four ways to be, where a block of n has 4ⁿ, which would have to be
captured one by one as prompts come to need them. It costs a launch for every layer of such a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from microglia.execution.base import Decision
from microglia.execution.captured.channels import Layout, Mlps
from microglia.execution.captured.variants import DecisionBuffers, Variant
from microglia.units import ChannelSite, HeadSite, Site, SublayerSite

WHOLE = False, False  # a layer that has lost neither attention nor MLP


class Part(NamedTuple):
    """Neighbouring layers that are captured and replayed together, and what they are captured for."""

    layers: range
    variant: Variant


@dataclass(frozen=True, eq=False)
class ByLayer:
    """Keeps of all layers, in order of depth: heads (L, B, H), channels (L, B, U), sublayers (L, B, 2).

    Channels and sublayers are None where nothing is decided about them. head_fill, channel_fill: of every layer what
    pruned units leave behind, None for nothing; empty where none does.
    """

    heads: Tensor
    channels: Tensor | None = None
    sublayers: Tensor | None = None
    head_fill: Sequence[Tensor | None] = ()
    channel_fill: Sequence[Tensor | None] = ()

    @staticmethod
    def of(decision: Decision, sites: Sequence[Site], like: Tensor) -> "ByLayer":
        """A decision about these sites, every kind in order of depth; `like` (L, B, H) has the sizes of heads.

        Without sites it is one about the heads of every layer.
        """
        rows = [k.expand(like.shape[1], -1) for k in decision.keep]
        if not sites:
            return ByLayer(torch.stack(rows).float(), head_fill=decision.fill or ())

        def keep_of(kind: type[Site]) -> Tensor | None:
            own = [k for site, k in zip(sites, rows, strict=True) if isinstance(site, kind)]
            return torch.stack(own).float() if own else None

        def fill_of(kind: type[Site]) -> list[Tensor | None]:
            return [decision.fill_of(site) for site in sites if isinstance(site, kind)] if decision.fill else []

        heads = keep_of(HeadSite)
        return ByLayer(
            torch.ones_like(like) if heads is None else heads,
            keep_of(ChannelSite),
            keep_of(SublayerSite),
            fill_of(HeadSite),
            fill_of(ChannelSite),
        )

    def on_host(self) -> "ByLayer":
        """The same on the host, in one copy."""
        present = [part for part in (self.heads, self.channels, self.sublayers) if part is not None]
        copied = torch.cat([part.flatten() for part in present]).cpu().split([part.numel() for part in present])
        ready = iter([x.view(part.shape) for x, part in zip(copied, present, strict=True)])
        channels, sublayers = self.channels is not None, self.sublayers is not None
        return ByLayer(next(ready), next(ready) if channels else None, next(ready) if sublayers else None)

    def gone(self) -> list[tuple[bool, bool]]:
        """Of every layer, whether no row has its attention, and its MLP."""
        if self.sublayers is None:
            return [WHOLE] * len(self.heads)
        return [(not attention, not mlp) for attention, mlp in (self.sublayers > 0).any(1).tolist()]

    def scales(self, layers: range, *, masked: bool) -> bool:
        """Whether sublayers of these layers are multiplied by what rows decide. masked: also those that all decide."""
        if self.sublayers is None:
            return False
        own = self.sublayers[layers.start : layers.stop] > 0
        return not bool((own.all() if masked else own == own[:, :1]).all())


def parts_of(
    keep: ByLayer, buffers: DecisionBuffers, mlps: Mlps, layout: Layout | None, *, masked: bool = False
) -> list[Part]:
    """The parts for a decision on the host. layout: of its channels. masked: everything is still computed."""
    lost = [WHOLE] * len(keep.heads) if masked else keep.gone()
    every: list[tuple[range, tuple[bool, bool]]] = []
    for layers in buffers.blocks:
        if any(any(lost[layer]) for layer in layers):
            every += [(range(layer, layer + 1), lost[layer]) for layer in layers]
        else:
            every.append((layers, WHOLE))
    variants = buffers.variants(keep.heads, [layers for layers, _ in every], masked=masked)
    parts = []
    for (layers, gone), heads in zip(every, variants, strict=True):
        mlp = None
        if keep.channels is not None and layout is not None and not gone[1]:
            mlp = mlps.shape(keep.channels[layers.start : layers.stop], layout.block, masked=masked)
        attention = buffers.dense if gone[0] else heads
        scaled = keep.scales(layers, masked=masked)
        parts.append(Part(layers, replace(attention, mlp=mlp, gone=gone, scaled=scaled)))
    return parts
