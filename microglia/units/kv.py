"""Key/value caches that hold kept heads only: of all rows the same, or of each row its own."""

from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from microglia.errors import MicrogliaError

# Layers that are known to hold every token they attend to in `keys` and `values`; quantised ones, say, do not.
WHOLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x` (B, G, T, D) and each row's own `index` (B, k) → (B, k, T, D)."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3]))


def keep_kv_heads(stack: ExitStack, kv: Cache, layer: int, index: Tensor) -> None:
    """Drop the key/value heads not in `index` from one layer of a prompt's cache; what they held is gone for good.

    `index` (k,) for the same heads in every row; (B, k) for each row's own, in which case later updates are cut too.
    When `stack` closes, a static cache is empty and whole again: its owner fills it anew, with every head.
    """
    entry: Any = kv.layers[layer]
    if type(entry) not in WHOLE:
        raise MicrogliaError(
            f"the cache's layer {layer} is a {type(entry).__name__}, which may not hold every token in its keys and "
            "values; use a dynamic or static cache"
        )
    stack.callback(_given_back, kv, layer, entry)
    if index.dim() == 1:
        if entry.keys is not None and entry.keys.numel():
            entry.keys, entry.values = entry.keys.index_select(1, index), entry.values.index_select(1, index)
        return
    if entry.keys is not None and entry.keys.numel():
        entry.keys, entry.values = take_rows(entry.keys, index), take_rows(entry.values, index)
    kv.layers[layer] = _as(RowHeads, entry, index=index)


def drop_kv(stack: ExitStack, kv: Cache, layer: int) -> None:
    """Drop every key and value of one layer of a prompt's cache, which goes on counting tokens; see `keep_kv_heads`."""
    entry: Any = kv.layers[layer]
    keys = entry.keys
    keep_kv_heads(stack, kv, layer, torch.zeros(0, dtype=torch.long, device=None if keys is None else keys.device))
    kv.layers[layer] = _as(NoHeads, entry)


def _given_back(kv: Cache, layer: int, entry: Any) -> None:
    """A static layer is whole and empty again; a dynamic one, whose tokens lack heads, says so if it is used."""
    present: Any = kv.layers[layer]
    kv.layers[layer] = entry
    if not isinstance(entry, StaticLayer):
        entry.keys, entry.values = present.keys, present.values
        entry.update = _spent
        return
    if int(kv.get_seq_length()) > 0:
        for one in kv.layers:
            one.reset()
    entry.is_initialized = False  # makes its tensors anew, of the shape that the model then writes


def _spent(*_: Any, **__: Any) -> Any:
    raise MicrogliaError("this cache lost heads to an answer that is over; read the prompt again into a new cache")


class RowHeads:
    """Mixed into a cache layer in which every row holds its own `index` (B, k) of the key/value heads: `(B, k, T, D)`.

    Everything but `update` stays the layer's own: lengths, sliding windows, cropping, and reordering (beams of a prompt
    share its decision).
    """

    index: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values (B, G, T, D) of all heads → kept ones of all tokens (B, k, T', D)."""
        keys, values = take_rows(key_states, self.index), take_rows(value_states, self.index)
        whole: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)  # type: ignore[misc]
        return whole


class NoHeads:
    """Mixed into a cache layer that holds no head, `(B, 0, T, D)`, and still says how many tokens it has seen."""

    def get_seq_length(self) -> int:
        """A dynamic layer takes tensors without elements for none; others count by themselves."""
        layer: Any = self
        if isinstance(self, DynamicLayer) and not isinstance(self, DynamicSlidingWindowLayer):
            return int(layer.keys.shape[-2])
        return int(super().get_seq_length())  # type: ignore[misc]


def _as(mixin: type, entry: Any, **attributes: Any) -> Any:
    """A cache layer's tensors and numbers in a layer with a mixin."""
    kind: Any = _mixed(mixin, type(entry))  # type: ignore[arg-type]  # mypy: a class is not Hashable
    view: Any = kind.__new__(kind)
    view.__dict__.update(entry.__dict__, **attributes)
    return view


@cache
def _mixed(mixin: type, layer: type) -> type:
    # _layer_type None: a subclass must not register itself as the library's class for that type of layer.
    return type(f"{mixin.__name__}{layer.__name__}", (mixin, layer), {"_layer_type": None})


def kv_bytes(kv: Cache) -> int:
    """Bytes of keys and values that a cache holds now."""
    return sum(layer_bytes(layer) for layer in kv.layers)


def layer_bytes(layer: Any) -> int:
    """Bytes of keys and values that one layer of a cache holds now."""
    tensors = [t for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
