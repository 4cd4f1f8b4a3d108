"""Attention of a captured step: one query per row over a static cache, most of whose places may be empty.

`stock` is the model's own back end. Its kernel gives every head (or group) one block of threads, which walks over all
keys and computes 64 rows of products where one is needed: at small batch and long context most of the device is idle.
`products` writes the same as two matrix products with a softmax between them. They read every key and value once, on
the whole device, and need no copy of a group's keys for each of its query heads.
`kernel` does so in one pass: it needs no tensor of scores, reads no place that is still empty, and takes the queries of
each row's own heads from where they are. Where there is no Triton it is made of products.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from microglia.anatomy.attention import AttentionFunction
from microglia.execution.captured.decode import by_kernel, by_products
from microglia.execution.captured.kv import StaticKV
from microglia.units.head import attend_rows

ADDED_MASK = "microglia_added"  # the name by which the library finds `added_mask`


@dataclass
class StepLayer:
    """What differs between the layers of a step; each layer's config holds its own.

    kv: its cache. stock: the attention function that it calls by itself. way: how attention is made, see above.
    gate: (B, H), where every head is computed and multiplied. own: (B, g·q), the query heads of each row by its groups
    and -1 for none, where rows have their own heads.
    """

    kv: StaticKV
    stock: AttentionFunction
    way: str = "stock"
    gate: Tensor | None = None
    own: Tensor | None = None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """(B, 1, H, D) and nothing else, as attention functions return it."""
        if self.way == "stock":
            return self.stock(module, query, key, value, mask, **kwargs)
        scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        if self.way == "products":
            return by_products(query, key, value, mask, scale=scale, softcap=softcap), None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        keys, values = key.transpose(0, 1), value.transpose(0, 1)  # as they are stored
        return by_kernel(query, keys, values, mask, self.kv.place.position, self.own, scale, softcap or 0.0), None


def step_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention of a step, with what its variant adds: q (B, H, 1, D) → (B, 1, H, D), in every layer."""
    layer: StepLayer = module.config.step_layer
    if layer.kv.rows is not None and layer.way != "kernel":
        return attend_rows(layer.attend, module, layer.kv.rows, query, key, value, mask, **kwargs), None
    output = layer.attend(module, query, key, value, mask, **kwargs)[0]
    return (output if layer.gate is None else output * layer.gate[:, None, :, None].to(output.dtype)), None


def added_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The mask of a step as what is added to the scores, once for all layers; sdpa would make it in every layer.

    As the library's own mask for eager attention, which some of its versions make from a number of Python's: a copy
    from the host, which no CUDA graph takes.
    """
    visible = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    assert visible is not None  # what is skipped here is a causal mask, or one that hides nothing in both directions
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


AttentionMaskInterface.register(ADDED_MASK, added_mask)


@functools.cache
def uncompiled() -> Callable[..., Any]:
    """`step_attention` outside compiled code, where the library would copy keys once per query head of a group."""
    function: Callable[..., Any] = torch.compiler.disable(step_attention)
    return function
