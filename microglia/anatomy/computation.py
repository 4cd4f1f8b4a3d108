"""What a model computes between its projections, as data: enough to write its decode step without its code.

Everything is found by what the modules are, and what is not known for certain is refused: a forward pass of somebody's
own, hooks and adapters on a layer, another norm or activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microglia.anatomy.anatomy import Anatomy, Layer
from microglia.anatomy.geometry import HeadGeometry
from microglia.anatomy.layouts import Fused, Separate
from microglia.anatomy.projection import features
from microglia.errors import UnsupportedModelError

Activation = Literal["silu", "tanh_gelu", "gelu", "relu"]
ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "tanh_gelu",
    "NewGELUActivation": "tanh_gelu",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}
INSTEAD = "use execution='compact'"


@dataclass(frozen=True, eq=False)
class Norm:
    """`rms`: x / rms(x) · weight. `layer`: (x - mean) / deviation · weight + bias. All in float32."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Projection:
    """Outputs first … first + outputs of a linear module."""

    module: nn.Module
    first: int
    outputs: int


@dataclass(frozen=True, eq=False)
class Rotary:
    """The frequencies (R,) of a rotary embedding, which turns the first 2·R numbers of a head, and a common factor."""

    frequencies: Tensor
    factor: float


@dataclass(frozen=True, eq=False)
class LayerComputation:
    """One layer: x += attended(attention(norm(x))), then x += fed(down(activation(gate) · up)) of its norm.

    window: keys that a query sees, None for all. rotary: its place among the model's, None without. gate: None in an
    MLP that has none. norms: before attention, of queries and of keys, of what attention gave, before the MLP, of what
    the MLP gave; None where the family has none.
    """

    heads: HeadGeometry
    channels: int
    window: int | None
    scaling: float
    softcap: float | None
    rotary: int | None
    activation: Activation
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection | None
    up: Projection
    down: Projection
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None, Norm | None, Norm | None]


@dataclass(frozen=True, eq=False)
class Computation:
    """The whole model. embedding (V, hidden) times factor, plus positions (P, hidden) where there are such."""

    embedding: Tensor
    factor: float
    positions: Tensor | None
    rotaries: tuple[Rotary, ...]
    layers: tuple[LayerComputation, ...]
    last: Norm
    head: Projection
    softcap: float | None


def computation(anatomy: Anatomy) -> Computation:
    """What a model computes. Raises UnsupportedModelError, in one sentence, where that is not known for certain."""
    lm, stack = anatomy.lm, anatomy.stack
    _check(anatomy)
    by_kind = hasattr(_rotary_module(stack), "layer_types")
    kinds: list[str | None] = [*sorted(set(anatomy.layer_kinds))] if by_kind else [None]
    embedding, config = lm.get_input_embeddings(), anatomy.text_config
    scaled = getattr(embedding, "embed_scale", None)
    factor = 1.0 if scaled is None else float(torch.as_tensor(scaled).to(embedding.weight.dtype))
    layers = tuple(_layer(anatomy, layer, kinds) for layer in anatomy.layers)
    last = getattr(stack, "norm", None) or getattr(stack, "ln_f", None)
    head = lm.get_output_embeddings()
    positions = getattr(stack, "wpe", None)
    return Computation(
        embedding.weight.detach(),
        factor,
        None if positions is None else positions.weight.detach(),
        tuple(_rotaries(_rotary_module(stack), kinds)),
        layers,
        _norm(last, anatomy),
        Projection(head, 0, len(head.weight)),
        getattr(config, "final_logit_softcapping", None),
    )


def _rotary_module(stack: Any) -> Any:
    return getattr(stack, "rotary_emb", None)


def _rotaries(module: Any, kinds: list[str | None]) -> Iterator[Rotary]:
    for kind in kinds if module is not None else []:
        prefix = "" if kind is None else f"{kind}_"
        scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
        yield Rotary(getattr(module, f"{prefix}inv_freq").detach().float(), scaling)


def _layer(anatomy: Anatomy, layer: Layer, kinds: list[str | None]) -> LayerComputation:
    family, module = layer.family, layer.module
    attention: Any = layer.attention
    up, down = [getattr(layer.mlp, name) for name in family.mlp.up], getattr(layer.mlp, family.mlp.down)
    channels = features(down, of_inputs=True)
    gate = Projection(up[0], 0, channels) if family.mlp.packed or len(up) > 1 else None
    rotary = None
    if _rotary_module(anatomy.stack) is not None:
        rotary = 0 if kinds == [None] else kinds.index(anatomy.layer_kinds[layer.index])
    after = [getattr(module, name) for name in family.norms_after] or [None, None]
    before = [getattr(module, name) for name in family.norms]
    own = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    norms = [None if one is None else _norm(one, anatomy) for one in (before[0], *own, after[0], before[1], after[1])]
    return LayerComputation(
        layer.heads,
        channels,
        anatomy.windows[layer.index],
        float(attention.scaling),
        getattr(attention, "attn_logit_softcapping", None) if family.softcap else None,
        rotary,
        _activation(layer, anatomy),
        *_attention(layer),
        gate,
        Projection(up[-1], channels if family.mlp.packed else 0, channels),
        Projection(down, 0, anatomy.hidden_size),
        tuple(norms),  # type: ignore[arg-type]  # six of them
    )


def _attention(layer: Layer) -> tuple[Projection, Projection, Projection, Projection]:
    layout, heads, attention = layer.family.attention, layer.heads, layer.attention
    output = getattr(attention, layout.o)
    o = Projection(output, 0, features(output, of_inputs=False))
    if isinstance(layout, Fused):
        module = getattr(attention, layout.qkv)
        sizes = (heads.width, heads.kv_width, heads.kv_width)
        q, k, v = (Projection(module, sum(sizes[:i]), size) for i, size in enumerate(sizes))
        return q, k, v, o
    assert isinstance(layout, Separate)
    modules = [getattr(attention, name) for name in (layout.q, layout.k, layout.v)]
    q, k, v = (Projection(module, 0, features(module, of_inputs=False)) for module in modules)
    return q, k, v, o


def _norm(module: Any, anatomy: Anatomy) -> Norm:
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        bias = None if module.bias is None else module.bias.detach().float()
        return Norm("layer", module.weight.detach().float(), bias, module.eps)
    prefix = type(anatomy.layers[0].attention).__name__.removesuffix("Attention")
    if name != f"{prefix}RMSNorm":
        raise UnsupportedModelError(f"the norm {name} is not one that a fast step knows; {INSTEAD}")
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm("rms", module.weight.detach().float() + anatomy.family.norm_offset, None, float(eps))


def _activation(layer: Layer, anatomy: Anatomy) -> Activation:
    names = [type(child).__name__ for child in layer.mlp.children()]
    found = [ACTIVATIONS[name] for name in names if name in ACTIVATIONS]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{layer.mlp_name} has {', '.join(names)}, among which a fast step knows no activation; {INSTEAD}"
        )
    return found[0]


def _check(anatomy: Anatomy) -> None:
    """Refuse what is not the library's own code on plain weights of a CPU."""
    lm = anatomy.lm
    kind = type(lm).__name__
    if not anatomy.family.steps:
        raise UnsupportedModelError(
            f"it is not known what a layer of {kind} computes besides its projections; {INSTEAD}"
        )
    if not any(base.__name__ == anatomy.family.causal for base in type(lm).__mro__):
        raise UnsupportedModelError(f"{kind} is more than a {anatomy.family.causal}; {INSTEAD}")
    for name, module in lm.named_modules():
        own = module is lm  # whose passes we replace ourselves
        if not own and ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedModelError(
                f"{name} of this {kind} is hooked or replaced, which a fast step skips; {INSTEAD}"
            )
        home = type(module).forward.__module__
        if not home.startswith(("transformers.", "torch.nn.", "microglia.export.")):
            raise UnsupportedModelError(f"{name or kind} has a forward pass of its own, in {home}; {INSTEAD}")
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and not _is_plain(weight):
            raise UnsupportedModelError(f"the weights of {name} are not plain floats on a CPU; {INSTEAD}")


def _is_plain(weight: Any) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
