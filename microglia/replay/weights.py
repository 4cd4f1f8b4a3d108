"""Compact weights in buffers that never move: a level is a view of them, a new prompt copies its heads in."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microglia.errors import MicrogliaError
from microglia.geometry import HeadGeometry
from microglia.replay.kv import widest
from microglia.replay.levels import Level, Placement
from microglia.sites import Site
from microglia.sites.layouts import Cut, plain
from microglia.slicing import check_plain


class CompactWeights:
    """The projections of one site with the heads of the present decision.

    Every level below the full one is a contiguous view from the start of one flat buffer per tensor: no level has
    memory of its own, and what a captured step reads never moves. The full level is the model's own weights.
    """

    def __init__(self, site: Site, levels: Sequence[Level]) -> None:
        self.site = site
        self.cuts = {level: self._cuts(level) for level in levels if level != levels[0]}
        self.flat: dict[tuple[str, str], Tensor] = {}
        self.modules: dict[tuple[Level, str], nn.Module] = {}
        for cut in next(iter(self.cuts.values()), []):
            inner, name = self._inner(cut), f"{site.name}.{cut.projection}"
            if inner is not getattr(site.attention, cut.projection):
                raise MicrogliaError(
                    f"{name} carries an adapter, which captured steps do not follow; merge it first, "
                    "model = model.merge_and_unload(), or use path='compact'"
                )
            check_plain(inner.weight, inner, name, "captured steps follow float weights only, use path='compact'")
            for part in ("weight", "bias"):
                self._reserve(cut.projection, part)

    def _inner(self, cut: Cut) -> Any:
        return plain(getattr(self.site.attention, cut.projection))

    def _cuts(self, level: Level) -> list[Cut]:
        """Of some heads and groups of a level: what counts here is how many."""
        return self.site.layout.cuts(self.site.geometry, torch.arange(level.heads), torch.arange(level.groups))

    def _reserve(self, projection: str, part: str) -> None:
        shapes = [
            _shape(self._inner(c), c, part) for cuts in self.cuts.values() for c in cuts if c.projection == projection
        ]
        sizes = [torch.Size(shape).numel() for shape in shapes if shape is not None]
        if sizes:
            like = getattr(plain(getattr(self.site.attention, projection)), part)
            self.flat[projection, part] = torch.zeros(max(sizes), dtype=like.dtype, device=like.device)

    def view(self, cut: Cut, part: str) -> Tensor | None:
        """The part of the buffer that a cut fills; None for what the cut does not change (a bias after the heads)."""
        shape = _shape(self._inner(cut), cut, part)
        return None if shape is None else self.flat[cut.projection, part][: torch.Size(shape).numel()].view(shape)

    def projections(self, level: Level) -> dict[str, nn.Module]:
        """The compact projections of a level by their names; the same modules every time."""
        for cut in self.cuts[level]:
            if (level, cut.projection) not in self.modules:
                self.modules[level, cut.projection] = self._module(cut)
        return {name: module for (at, name), module in self.modules.items() if at == level}

    def _module(self, cut: Cut) -> nn.Module:
        inner = self._inner(cut)
        module = copy.copy(inner)
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        parts = {part: self.view(cut, part) for part in ("weight", "bias")}
        module._parameters = {
            part: getattr(inner, part) if view is None else nn.Parameter(view, requires_grad=False)
            for part, view in parts.items()
        }
        for name in ("in_features", "nx") if cut.of_inputs else ("out_features", "nf"):
            if hasattr(inner, name):
                setattr(module, name, len(cut.index))
        return module

    def gather(self, level: Level, placement: Placement) -> None:
        """Copy the heads of a decision that all rows share into the buffers; heads that only fill up write nothing."""
        geometry, size = self.site.geometry, self.site.geometry.head_dim
        whole = HeadGeometry(geometry.heads, geometry.kv_heads, 1)  # copied head by head: much faster than row by row
        now = self.site.layout.cuts(whole, placement.heads[0], placement.slots[0])
        for cut, index in zip(self.cuts[level], [cut.index for cut in now], strict=True):
            inner, dim = self._inner(cut), _dim(self._inner(cut), cut)
            weight, bias = self.view(cut, "weight"), self.view(cut, "bias")
            assert weight is not None
            source, target = (x.unflatten(dim, (-1, size)) for x in (inner.weight.detach(), weight))
            torch.index_select(widest(source), dim, index, out=widest(target))
            if cut.of_inputs:
                asked = placement.asked[0].to(target.dtype)  # of the same type: a mixed product is three times slower
                target.mul_(asked.view([-1 if d == dim else 1 for d in range(3)]))
            if bias is not None:
                torch.index_select(inner.bias.detach().unflatten(0, (-1, size)), 0, index, out=bias.view(-1, size))


def _dim(inner: Any, cut: Cut) -> int:
    """The dimension of the weight that a cut shortens; GPT-2's Conv1D stores (in, out)."""
    return int(cut.of_inputs) ^ int(hasattr(inner, "nf"))


def _shape(inner: Any, cut: Cut, part: str) -> list[int] | None:
    if part == "bias":
        return None if inner.bias is None or cut.of_inputs else [len(cut.index)]
    shape = list(inner.weight.shape)
    shape[_dim(inner, cut)] = len(cut.index)
    return shape
