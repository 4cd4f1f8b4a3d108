"""A variant of a layer, put into the model while it is captured."""

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from microglia.anatomy import swap, with_attention
from microglia.execution.captured.attention import step_attention, uncompiled
from microglia.execution.captured.sublayers import Around, put_around
from microglia.execution.captured.variants import Variant
from microglia.units import HeadSite

if TYPE_CHECKING:
    from microglia.execution.captured.step import CapturedStep


def install(stack: ExitStack, step: "CapturedStep", site: HeadSite, variant: Variant, way: str) -> None:
    """Until the stack closes, the layer of a site is that of a variant, with attention made in this way."""
    attention, mlp = variant.gone
    if not attention:
        _attention(stack, step, site, variant, way)
    if not mlp:
        _mlp(stack, step, site, variant)


def _attention(stack: ExitStack, step: "CapturedStep", site: HeadSite, variant: Variant, way: str) -> None:
    kv, attention, bucket, layer = step.kv(site), site.attention, variant.bucket, step.layers[site.index]
    kv.active = kv.first(bucket.groups)
    kv.rows = step.decision.rows_of(site.index, bucket) if variant.kind == "rows" else None
    layer.way, layer.gate = way, step.decision.keep[site.index] if variant.kind == "masked" else None
    layer.own = step.decision.own[site.index][:, : bucket.heads] if variant.kind == "rows" else None
    if variant.kind == "shared":
        site.rewrite(stack, site.geometry.kept(bucket.heads, bucket.groups))
        for name, module in step.model.weights[site.index].projections(bucket).items():
            swap(stack, attention, name, module)
    bias = None if step.decision.bias is None or variant.kind == "dense" else step.decision.bias[site.index]
    _output(stack, step, site, 0, variant, Around(bias=bias))
    compiled = step.model.compiler is not None
    function = uncompiled() if compiled and way == "stock" else step_attention
    swap(stack, attention, "config", with_attention(attention.config, function, step_layer=layer))
    if compiled:  # another number would make every layer another one for the compiler; see LayerCache
        swap(stack, attention, "layer_idx", 0)


def _mlp(stack: ExitStack, step: "CapturedStep", site: HeadSite, variant: Variant) -> None:
    shape, channels = variant.mlp, step.channels
    if shape is None or channels is None:
        _output(stack, step, site, 1, variant, Around())
        return
    if shape.is_cut:
        for name, module in step.model.mlps.weights[site.index].projections(shape.channels).items():
            swap(stack, site.layer.mlp, name, module)
    bias = None if channels.bias is None else channels.bias[site.index]
    _output(stack, step, site, 1, variant, Around(channels.gate(site.index, shape), bias))


def _output(
    stack: ExitStack, step: "CapturedStep", site: HeadSite, half: int, variant: Variant, around: Around
) -> None:
    """What a decision puts around the output projection of attention (0) or MLP (1), or the norm after it."""
    layer, family = site.layer, site.layer.family
    scale, after = step.scales[site.index, half] if variant.scaled else None, family.norms_after
    name = (family.attention.o, family.mlp.down)[half]
    put_around(stack, layer.halves[half], name, replace(around, scale=None if after else scale))
    if after:
        put_around(stack, layer.module, after[half], Around(scale=scale))
