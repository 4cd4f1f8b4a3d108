"""Heads that are really gone: kept heads become the model's weights, or each row's own heads become its cache.

A batch whose rows share one decision gets compact weights: rows of q, k, v and columns of o are gathered, the geometry
is rewritten with them (as gpt-fast does for tensor parallelism) and stock attention runs on the smaller shapes. A batch
whose rows decide for themselves keeps dense projections, read once for all rows, and attention over a `(B, k, T, D)`
cache of each row's own heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.cache import keep_kv_heads, take_rows
from microglia.errors import MicrogliaError
from microglia.fill import adder, left_behind
from microglia.geometry import HeadGeometry
from microglia.sites import Site, View, replaced_attention, stock_attention
from microglia.slicing import sliced


@contextmanager
def compacted(
    sites: Sequence[Site],
    keep: Sequence[Tensor],
    *,
    fill: Sequence[Tensor] | None = None,
    cache: Cache | None = None,
) -> Iterator[None]:
    """While inside, the sites have only their kept heads. Leaving restores the model bit for bit.

    `keep` (B, H) or (1, H) per site, hard. `fill` (B, H, D) per site is what pruned heads leave behind, zero when None.
    `cache` is the prompt's and loses the pruned key/value heads for good. Rows that agree on every site share compact
    weights; otherwise every row keeps its own heads in the cache.
    """
    shared = all(bool((k == k[:1]).all()) for k in keep)
    prune = _shared if shared else _per_row
    with ExitStack() as stack:
        for site, k in zip(sites, keep, strict=True):
            _check_hard(site, k)
            if bool((k > 0).all()):
                continue  # nothing is pruned here
            bias = left_behind(site, k, fill[site.index]) if fill is not None else None  # needs the dense projection
            prune(stack, site, (k[:1] if shared else k) > 0, cache)
            if bias is not None:
                stack.callback(site.output.register_forward_hook(adder(bias)).remove)
        yield


def _check_hard(site: Site, keep: Tensor) -> None:
    if not bool(((keep == 0) | (keep == 1)).all()):
        raise MicrogliaError(f"{site.name} got soft keeps; compaction needs keeps of 0 or 1, use Gate(mode='hard')")


# --- one decision for all rows: compact weights -----------------------------------------------------------------------


def _shared(stack: ExitStack, site: Site, keep: Tensor, cache: Cache | None) -> None:
    heads = keep[0].nonzero().flatten()
    groups = site.geometry.by_group(keep[0]).any(-1).nonzero().flatten()
    kept, block = _kept_geometry(site, keep[0], len(groups)), site.geometry.head_dim
    for cut in site.layout.cuts(site.geometry, heads, groups):
        name = f"{site.name}.{cut.projection}"
        _swap(stack, site.attention, cut.projection, sliced(getattr(site.attention, cut.projection), cut, name, block))
    attributes, config = site.layout.rewritten(kept)
    for name, value in attributes.items():
        _swap(stack, site.attention, name, value)
    if config:
        _swap(stack, site.attention, "config", View(site.attention.config, **config))
    if cache is not None:
        keep_kv_heads(cache, site.layer, groups)


def _kept_geometry(site: Site, keep: Tensor, groups: int) -> HeadGeometry:
    per_group = site.geometry.by_group(keep).sum(-1)
    counts = per_group[per_group > 0].unique()
    if len(counts) != 1:
        raise MicrogliaError(
            f"{site.name} keeps {per_group.tolist()} heads in its groups; every kept group must keep the same number, "
            "make decisions with microglia.gate.rectangle"
        )
    return site.geometry.kept(groups * int(counts), groups)


def _swap(stack: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    before = getattr(owner, name)
    stack.callback(setattr, owner, name, before)
    setattr(owner, name, value)


# --- every row its own decision: dense projections, a cache of own heads ----------------------------------------------


def _per_row(stack: ExitStack, site: Site, keep: Tensor, cache: Cache | None) -> None:
    groups, heads, asked = row_rectangle(keep, site.geometry)
    stack.enter_context(replaced_attention(site, _row_attention(site, groups, heads, asked)))
    if cache is None:
        raise MicrogliaError(
            "rows that decide for themselves live in the key/value cache; generate with use_cache=True"
        )
    keep_kv_heads(cache, site.layer, groups)


def row_rectangle(keep: Tensor, geometry: HeadGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Decisions (B, H) → each row's groups (B, g), its query heads (B, g·q) and which of those it asked for (B, g·q).

    g and q are the largest that any row needs; a row that needs fewer fills up with heads that stay gated off.
    """
    grouped = geometry.by_group(keep)  # (B, G, Q)
    in_use = grouped.any(-1)
    count = int(in_use.sum(-1).max())
    groups = (~in_use).to(torch.uint8).argsort(dim=-1, stable=True)[:, :count]  # (B, g)
    chosen = grouped.gather(1, groups[..., None].expand(-1, -1, geometry.queries_per_group))  # (B, g, Q)
    per_group = int(grouped.sum(-1).max())
    queries = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :per_group]  # (B, g, q)
    heads = (groups[..., None] * geometry.queries_per_group + queries).flatten(1)
    return groups, heads, keep.gather(1, heads)


def _row_attention(site: Site, groups: Tensor, heads: Tensor, asked: Tensor) -> Callable[..., Any]:
    stock = stock_attention(site.attention)
    kept = View(site.attention, num_key_value_groups=heads.shape[1] // groups.shape[1], config=site.attention.config)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """q (B, H, T, D) of all heads, k and v (B, g, Tk, D) of the rows' own → (B, T, H, D), zero where pruned."""
        if len(query) != len(heads):
            raise MicrogliaError(
                f"{site.name} got a batch of {len(query)} rows but decisions for {len(heads)}; "
                "continue the batch that was read"
            )
        output, _ = stock(kept, take_rows(query, heads), key, value, mask, **kwargs)  # (B, T, k, D)
        output = output * asked[:, None, :, None].to(output.dtype)
        batch, length, _, size = output.shape
        whole = output.new_zeros(batch, length, site.geometry.heads, size)
        return whole.scatter(2, heads[:, None, :, None].expand(-1, length, -1, size), output), None

    return attention
