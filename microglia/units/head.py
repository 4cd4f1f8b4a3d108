"""Attention heads: query heads of a layer, in groups that share a key/value head.

One decision for all rows gathers rows of q, k, v and columns of o, rewrites the geometry with them (as gpt-fast does
for tensor parallelism) and lets stock attention run on the smaller shapes. Rows that decide for themselves keep dense
projections, read once for all rows, and attention over a `(B, k, T, D)` cache of each row's own heads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import HeadGeometry, Layer, RowShape, View, replaced_attention, stock_attention, swap
from microglia.errors import MicrogliaError
from microglia.units.costs import UnitCosts
from microglia.units.kv import keep_kv_heads, take_rows
from microglia.units.site import ProjectedSite, check_rows, limited


@dataclass(frozen=True, eq=False)
class HeadSite(ProjectedSite):
    """The query heads of one attention layer."""

    geometry_type: ClassVar[type] = HeadGeometry

    geometry: HeadGeometry

    @classmethod
    def in_layer(cls, index: int, layer: Layer) -> "HeadSite":
        return cls(index, layer, layer.heads)

    @property
    def name(self) -> str:
        return self.layer.attention_name

    @property
    def attention(self) -> nn.Module:
        return self.layer.attention

    @property
    def holder(self) -> nn.Module:
        return self.layer.attention

    @property
    def projections(self) -> tuple[str, ...]:
        return self.layer.family.attention.projections

    def split(self, x: Tensor) -> Tensor:
        return self.geometry.split(x)

    def gate(self, keep: Tensor, where: Tensor | None, fill: Tensor | None) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads = self.split(inputs[0])  # (B, T, H, D)
            check_rows(self, len(heads), len(keep))
            factor = limited(keep[:, None, :, None].to(heads), where)
            heads = heads * factor if fill is None else heads * factor + (1 - factor) * fill[:, None].to(heads)
            return (self.joined(heads), *inputs[1:])

        return hook

    def cut(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        kept = self.geometry.kept_by(keep)
        if kept is None:
            per_group = self.geometry.by_group(keep).sum(-1).tolist()
            raise MicrogliaError(
                f"{self.name} keeps {per_group} heads in its groups; every kept group must keep the same number, "
                "make decisions with HeadGeometry.rectangle"
            )
        heads = keep.nonzero().flatten()
        groups = self.geometry.by_group(keep).any(-1).nonzero().flatten()
        self.cut_out(stack, self.layer.family.attention.cuts(self.geometry, heads, groups), self.geometry.head_dim)
        self.rewrite(stack, kept)
        if cache is not None:
            keep_kv_heads(stack, cache, self.layer.index, groups)

    def rewrite(self, stack: ExitStack, kept: HeadGeometry, **changes: Any) -> None:
        """Until `stack` closes, the attention module believes that it has the geometry `kept`.

        changes: more values in which its view of the config differs.
        """
        attributes, config = self.layer.family.attention.rewritten(kept)
        for name, value in attributes.items():
            swap(stack, self.attention, name, value)
        if config or changes:
            swap(stack, self.attention, "config", View(self.attention.config, **{**config, **changes}))

    def cut_rows(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        if cache is None:
            raise MicrogliaError(
                "rows that decide for themselves live in the key/value cache; generate with use_cache=True"
            )
        shape = self.geometry.row_shape(keep)
        stack.enter_context(replaced_attention(self.attention, _row_attention(self, shape)))
        keep_kv_heads(stack, cache, self.layer.index, shape.groups)

    def filled(self, stack: ExitStack, keep: Tensor, fill: Tensor) -> None:
        bias = self.fill_bias(keep, fill)

        def add(_: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (output[0] + bias, *output[1:])

        # After attention as a whole, since the cut puts another output projection in; before what gates all of it.
        stack.callback(self.attention.register_forward_hook(add, prepend=True).remove)

    # --- cost ---------------------------------------------------------------------------------------------------------

    def cut_sizes(self, keep: Tensor) -> Iterator[tuple[nn.Module, int, bool]]:
        shape = self.geometry.row_shape(keep[:1])
        for one in self.layer.family.attention.cuts(self.geometry, shape.heads[0], shape.groups[0]):
            yield getattr(self.attention, one.projection), len(one.index), one.of_inputs

    def costs(self, kv: float) -> UnitCosts:
        """Keys, values and their projections are a group's: they are read while any of its heads is kept."""
        geometry = self.geometry
        groups, queries = geometry.kv_heads, geometry.queries_per_group
        whole = self.saved_bytes(torch.zeros(1, geometry.heads)) + kv
        fewer = geometry.by_group(torch.ones(1, geometry.heads))
        fewer[..., 0] = 0  # one head less in every group
        per_head = self.saved_bytes(fewer.flatten(-2)) / groups if queries > 1 else whole / groups
        per_group = whole / groups - queries * per_head
        shared = torch.full((groups if queries > 1 else 0,), per_group, dtype=torch.float64)
        return UnitCosts(torch.full((geometry.heads,), per_head, dtype=torch.float64), shared)

    def kv_share(self, keep: Tensor) -> float:
        return self.geometry.row_shape(keep).groups.shape[-1] / self.geometry.kv_heads

    def attended_width(self, keep: Tensor | None = None) -> int:
        if keep is None:
            return self.geometry.width
        return self.geometry.row_shape(keep).heads.shape[-1] * self.geometry.head_dim


def _row_attention(site: HeadSite, shape: RowShape) -> Callable[..., tuple[Tensor, None]]:
    stock = stock_attention(site.attention)
    dense: Any = View(site.attention, config=site.attention.config)  # back ends look their own name up in the config

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        check_rows(site, len(query), len(shape.heads))
        return attend_rows(stock, dense, shape, query, key, value, mask, **kwargs), None

    return attention


def attend_rows(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    shape: RowShape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Attention of each row's own heads: q (B, H, T, D) of all heads, k and v (B, g, Tk, D) of the rows' own.

    attend: the attention function for the smaller shapes. Returns (B, T, H, D), zero where pruned.
    """
    heads = shape.heads
    kept: Any = View(module, num_key_value_groups=shape.queries_per_group)
    output = attend(kept, take_rows(query, heads), key, value, mask, **kwargs)[0]  # (B, T, k, D)
    output = output * shape.kept[:, None, :, None].to(output.dtype)
    batch, length, _, size = output.shape
    whole = output.new_zeros(batch, length, query.shape[1], size)
    return whole.scatter(2, heads[:, None, :, None].expand(-1, length, -1, size), output)
