"""Attention of a captured step: one query per row over a static cache, most of whose places may be empty.

`stock` is the model's own back end. Its kernel gives every head (or group) one block of threads, which walks over all
keys and computes 64 rows of products where one is needed: at small batch and long context most of the device is idle.
`products` writes the same as two matrix products with a softmax between them. They read every key and value once, on
the whole device, and need no copy of a group's keys for each of its query heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from microglia.cache import take_rows
from microglia.sites import View

KINDS = ("stock", "products")
ADDED_MASK = "microglia_added"  # the name by which the library finds `added_mask`


def step_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention of a step, with what its form adds: q (B, H, 1, D) → (B, 1, H, D).

    One function for all layers; what differs between them hangs on the StaticKV that stands for the layer's number.
    """
    kv: Any = module.layer_idx
    if kv.rows is None:
        output = _attend(kv, module, query, key, value, mask, kwargs)
        return (output if kv.gate is None else output * kv.gate[:, None, :, None].to(output.dtype)), None
    heads, asked = kv.rows.heads, kv.rows.asked
    kept = View(module, num_key_value_groups=heads.shape[1] // kv.rows.groups.shape[1])
    output = _attend(kv, kept, take_rows(query, heads), key, value, mask, kwargs)  # (B, 1, k, D)
    output = output * asked[:, None, :, None].to(output.dtype)
    whole = output.new_zeros(len(output), output.shape[1], query.shape[1], output.shape[3])
    return whole.scatter(2, heads[:, None, :, None].expand(-1, output.shape[1], -1, output.shape[3]), output), None


def added_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The mask of a step as what is added to the scores, once for all layers; sdpa would make it in every layer.

    As the library's own mask for eager attention, which some of its versions make from a number of Python's: a copy
    from the host, which no CUDA graph takes.
    """
    visible = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    assert visible is not None  # what is skipped here is a causal mask, or one that hides nothing in both directions
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


AttentionMaskInterface.register(ADDED_MASK, added_mask)


def _attend(
    kv: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    if kv.products:
        return by_products(query, key, value, mask, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
    output: Tensor = kv.stock(module, query, key, value, mask, **kwargs)[0]
    return output


def by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q (B, H, 1, D), k and v (B, G, T, D), mask (B, 1, 1, T) to be added → (B, 1, H, D); the softmax in float32."""
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # (B, G, H/G, D)
    scores = (grouped @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).flatten(1, 2)[:, None]


@functools.cache
def uncompiled() -> Callable[..., Any]:
    """`step_attention` outside compiled code, where the library would copy keys once per query head of a group."""
    function: Callable[..., Any] = torch.compiler.disable(step_attention)
    return function
