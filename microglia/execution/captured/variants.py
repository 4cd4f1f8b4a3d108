"""What a block of layers is captured for, and where the heads of the present decision stand in its static tensors.

Of attention there are four kinds:
- `dense`: every head, the model's own weights;
- `masked`: the same, each head's output multiplied by its gate (for decisions between the full bucket and the next, and
  for comparison);
- `shared`: compact weights, for rows that agree;
- `rows`: dense projections, each row's own heads in the cache.

MLPs have shapes of their own beside them, see `channels`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microglia.anatomy import HeadGeometry, RowShape
from microglia.execution.captured.buckets import Bucket, SlotMap, covering, packed_size, slot_map
from microglia.execution.captured.channels import MlpShape
from microglia.units import HeadSite


@dataclass(frozen=True)
class Variant:
    """A kind of step and the bucket of its shapes.

    kind, bucket: of attention. mlp: of the MLP, None for the model's own. gone: whether there is no attention, and no
    MLP; of a layer by itself only. scaled: whether each row's own decision multiplies what they add.
    """

    kind: Literal["dense", "masked", "shared", "rows"]
    bucket: Bucket
    mlp: MlpShape | None = None
    gone: tuple[bool, bool] = (False, False)
    scaled: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether heads must be copied into their slots before it runs."""
        return self.kind in ("shared", "rows")

    @property
    def level(self) -> "Variant":
        """Its attention, beside MLPs and sublayers of the model's own."""
        return Variant(self.kind, self.bucket)

    @property
    def is_of_heads(self) -> bool:
        """Whether MLPs and sublayers are the model's own."""
        return self == self.level


class DecisionBuffers:
    """Static tensors that hold a decision (B, H) per site: gates, slots, and what pruned heads leave behind."""

    def __init__(
        self,
        sites: Sequence[HeadSite],
        buckets: Sequence[Bucket],
        blocks: Sequence[range],
        batch: int,
        bias: Tensor | None,
    ) -> None:
        """bias: a template (B, 1, hidden) of what pruned heads leave behind, None where they leave nothing."""
        self.sites, self.buckets, self.blocks, self.batch = sites, buckets, blocks, batch
        self.geometry: HeadGeometry = sites[0].geometry  # of every site
        device = next(sites[0].output.parameters()).device
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, dtype=torch.long, device=device)
            heads, groups = self.geometry.heads, self.geometry.kv_heads
            self.keep = torch.ones(len(sites), batch, heads, device=device)
            self.slots = zeros(len(sites), batch, packed_size(self.geometry, buckets))  # slot maps, packed
            self.groups = zeros(len(sites), batch, groups)
            self.heads, self.own = zeros(len(sites), batch, heads), zeros(len(sites), batch, heads)  # see `StepLayer`
            self.kept = torch.zeros_like(self.keep)
            self.bias = None if bias is None else [torch.zeros_like(bias) for _ in sites]

    def slots_of(self, index: int, bucket: Bucket) -> SlotMap:
        """Where the heads of a site's decision stand: views of the static tensors."""
        return SlotMap.unpacked(self.slots[index], self.geometry, bucket)

    def rows_of(self, index: int, bucket: Bucket) -> RowShape:
        """Each row's own heads at a site: views of the static tensors."""
        return RowShape(
            self.groups[index][:, : bucket.groups],
            self.heads[index][:, : bucket.heads],
            self.kept[index][:, : bucket.heads],
        )

    def set_rows(self, layers: range, bucket: Bucket) -> None:
        """Copy the slots of these layers' sites to where a step over rows of own heads reads them."""
        sites = slice(layers.start, layers.stop)
        slots = SlotMap.unpacked(self.slots[sites], self.geometry, bucket)
        self.groups[sites, :, : bucket.groups].copy_(slots.groups)
        self.heads[sites, :, : bucket.heads].copy_(slots.heads)
        self.kept[sites, :, : bucket.heads].copy_(slots.kept)
        self.own[sites, :, : bucket.heads].copy_(torch.where(slots.kept > 0, slots.heads, -1))

    def places_of(self, index: int, bucket: Bucket) -> SlotMap:
        """Where in `slots`, counted over all of them, those of a site stand; on the host."""
        every = torch.arange(self.slots.numel()).view(self.slots.shape)
        return SlotMap.unpacked(every[index], self.geometry, bucket)

    def write(self, keep: Tensor, fill: Sequence[Tensor | None] | None) -> None:
        """The gates (sites, B, H) of a decision, and what its pruned heads leave behind."""
        self.keep.copy_(keep)
        for site, k, f in zip(self.sites, keep, fill or [], strict=False):
            if self.bias is not None and f is not None:
                self.bias[site.index].copy_(site.fill_bias(k, f))

    @property
    def dense(self) -> Variant:
        """The model itself."""
        return Variant("dense", self.buckets[0])

    def reset(self, parts: Sequence[tuple[range, Variant]]) -> None:
        """Every head kept, laid out for variants of some layers."""
        self.keep.fill_(1)
        self.place(parts, torch.ones(len(self.sites), self.batch, self.geometry.heads))

    def variants(self, keep: Tensor, blocks: Sequence[range], *, masked: bool = False) -> list[Variant]:
        """The variant of every block of layers for decisions (sites, B, H) on the host."""
        grouped = self.geometry.by_group(keep > 0)
        groups = grouped.any(-1).sum(-1).amax(-1).tolist()  # of each site
        queries = grouped.sum(-1).flatten(1).amax(-1).tolist()
        dense = (keep > 0).flatten(1).all(-1).tolist()
        agreed = (keep == keep[:, :1]).flatten(1).all(-1).tolist()
        full = self.buckets[0]

        def variant(block: range) -> Variant:
            sites = slice(block.start, block.stop)
            if all(dense[sites]):
                return Variant("dense", full)
            bucket = covering(self.buckets, max(groups[sites]), max(queries[sites]))
            if masked or bucket == full:
                return Variant("masked", full)
            return Variant("shared" if all(agreed[sites]) else "rows", bucket)

        return [variant(block) for block in blocks]

    def place(self, parts: Sequence[tuple[range, Variant]], keep: Tensor) -> None:
        """Find the slots of decisions (sites, B, H) on the host and copy them to the device at once.

        On the device it would be some twenty kernels at every site, for a few hundred numbers.
        """
        slots = torch.zeros(self.slots.shape, dtype=torch.long)
        for bucket in {variant.bucket for _, variant in parts if variant.is_cut}:
            sites = [index for layers, variant in parts if variant.bucket == bucket for index in layers]
            packed = slot_map(keep[sites], self.geometry, bucket).packed()
            slots[sites, :, : packed.shape[-1]] = packed
        self.slots.copy_(slots)
