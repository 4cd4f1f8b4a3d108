"""Compact weights in buffers that never move: a bucket is a view of them, a new prompt copies its heads in."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from microglia.anatomy import HeadGeometry
from microglia.anatomy.projection import Cut, check_plain, plain, resized, weight_dim
from microglia.errors import MicrogliaError
from microglia.execution.captured.buckets import Bucket, SlotMap
from microglia.execution.captured.kv import widest
from microglia.execution.captured.moves import Copy, copies_of_units
from microglia.units import HeadSite

Shape = TypeVar("Shape")


class CompactProjections(Generic[Shape]):
    """The projections of one module with the units of the present decision.

    Every shape below the full one is a contiguous view from the start of one flat buffer per tensor: no shape has
    memory of its own, and what a captured step reads never moves. The full shape is the model's own weights.
    """

    def __init__(self, holder: nn.Module, name: str, cuts: Mapping[Shape, Sequence[Cut]]) -> None:
        """holder: the module, called `name`. cuts: of every smaller shape, its rows and columns: how many counts."""
        self.holder, self.cuts = holder, cuts
        self.flat: dict[tuple[str, str], Tensor] = {}
        self.modules: dict[tuple[Shape, str], nn.Module] = {}
        for cut in next(iter(cuts.values()), []):
            inner, path = self._inner(cut.projection), f"{name}.{cut.projection}"
            if inner is not getattr(holder, cut.projection):
                raise MicrogliaError(
                    f"{path} carries an adapter, which captured steps do not follow; merge it first, "
                    "model = model.merge_and_unload(), or use execution='compact'"
                )
            check_plain(inner.weight, inner, path, "captured steps follow float weights only, use execution='compact'")
            for part in ("weight", "bias"):
                self._reserve(cut.projection, part)

    def _inner(self, projection: str) -> Any:
        return plain(getattr(self.holder, projection))

    def _shape(self, cut: Cut, part: str) -> list[int] | None:
        inner = self._inner(cut.projection)
        if part == "bias":
            return None if inner.bias is None or cut.of_inputs else [len(cut.index)]
        shape = list(inner.weight.shape)
        shape[weight_dim(inner, of_inputs=cut.of_inputs)] = len(cut.index)
        return shape

    def _reserve(self, projection: str, part: str) -> None:
        cuts = [cut for every in self.cuts.values() for cut in every if cut.projection == projection]
        sizes = [torch.Size(shape).numel() for cut in cuts if (shape := self._shape(cut, part)) is not None]
        if sizes:
            like = getattr(self._inner(projection), part)
            self.flat[projection, part] = torch.zeros(max(sizes), dtype=like.dtype, device=like.device)

    def view(self, cut: Cut, part: str) -> Tensor | None:
        """The part of the buffer that a cut fills; None for what the cut does not change (a bias after the units)."""
        shape = self._shape(cut, part)
        return None if shape is None else self.flat[cut.projection, part][: torch.Size(shape).numel()].view(shape)

    def projections(self, shape: Shape) -> dict[str, nn.Module]:
        """The compact projections of a shape by their names; the same modules every time."""
        for cut in self.cuts[shape]:
            if (shape, cut.projection) not in self.modules:
                inner, weight, bias = self._inner(cut.projection), self.view(cut, "weight"), self.view(cut, "bias")
                assert weight is not None
                bias = inner.bias if bias is None else bias
                module = resized(inner, weight, bias, len(cut.index), of_inputs=cut.of_inputs)
                self.modules[shape, cut.projection] = module
        return {name: module for (at, name), module in self.modules.items() if at == shape}

    def select(self, cuts: Sequence[Cut], indices: Sequence[Tensor], size: int, kept: Tensor) -> None:
        """Copy units of `size` neighbours each into the buffers, by their numbers in every projection of `cuts`.

        kept: (units,), 0 for what only fills up: its columns become zero.
        """
        for cut, index in zip(cuts, indices, strict=True):
            inner = self._inner(cut.projection)
            dim = weight_dim(inner, of_inputs=cut.of_inputs)
            weight, bias = self.view(cut, "weight"), self.view(cut, "bias")
            assert weight is not None
            source, target = (x.unflatten(dim, (-1, size)) for x in (inner.weight.detach(), weight))
            torch.index_select(widest(source), dim, index, out=widest(target))
            if cut.of_inputs:
                of_type = kept.to(target.dtype)  # of the same type: a mixed product is three times slower
                target.mul_(of_type.view([-1 if d == dim else 1 for d in range(3)]))
            if bias is not None:
                torch.index_select(inner.bias.detach().unflatten(0, (-1, size)), 0, index, out=bias.view(-1, size))


class CompactWeights(CompactProjections[Bucket]):
    """The projections of one attention layer with the heads of the present decision."""

    def __init__(self, site: HeadSite, every: Sequence[Bucket]) -> None:
        self.site = site
        super().__init__(site.holder, site.name, {bucket: self._cuts(bucket) for bucket in every if bucket != every[0]})

    def _cuts(self, bucket: Bucket) -> list[Cut]:
        """Of some heads and groups of a bucket: what counts here is how many."""
        heads, groups = torch.arange(bucket.heads), torch.arange(bucket.groups)
        return self.site.layer.family.attention.cuts(self.site.geometry, heads, groups)

    def copies(self, bucket: Bucket, where: SlotMap) -> list[Copy] | None:
        """What `gather` copies, as data: `where` in all slots those of this site stand; None for weights in pieces."""
        geometry, size = self.site.geometry, self.site.geometry.head_dim
        whole = HeadGeometry(geometry.heads, geometry.kv_heads, 1)
        layout = self.site.layer.family.attention
        heads, groups = torch.arange(bucket.heads), torch.arange(bucket.groups)
        first = layout.cuts(whole, torch.zeros_like(heads), torch.zeros_like(groups))
        numbered = layout.cuts(whole, heads, bucket.heads + groups)
        places, kept = torch.cat([where.heads[0], where.groups[0]]).tolist(), where.kept[0].tolist()
        found: list[Copy] = []
        for cut, start, number in zip(self.cuts[bucket], first, numbered, strict=True):
            starts, slots = start.index.tolist(), (number.index - start.index).tolist()
            units = [(places[i], at, kept[i] if cut.of_inputs else -1) for i, at in zip(slots, starts, strict=True)]
            inner = self._inner(cut.projection)
            for part, dim in (("weight", weight_dim(inner, of_inputs=cut.of_inputs)), ("bias", 0)):
                target = self.view(cut, part)
                if target is None:
                    continue
                source = getattr(inner, part).detach()
                if not source.is_contiguous():
                    return None
                found += copies_of_units(source, target, dim, size, units)
        return found

    def gather(self, bucket: Bucket, slots: SlotMap) -> None:
        """Copy the heads of a decision that all rows share into the buffers; heads that only fill up write nothing."""
        geometry, size = self.site.geometry, self.site.geometry.head_dim
        whole = HeadGeometry(geometry.heads, geometry.kv_heads, 1)  # copied head by head: much faster than row by row
        now = self.site.layer.family.attention.cuts(whole, slots.heads[0], slots.groups[0])
        self.select(self.cuts[bucket], [cut.index for cut in now], size, slots.kept[0])
