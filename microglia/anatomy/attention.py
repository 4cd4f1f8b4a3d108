"""The reversible replacement of a layer's attention function, and views in which some attributes differ."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_NAME = "microglia"


class View:
    """A live, read-only view of an object (a config, a module) in which some attributes differ.

    A copy of a config would go stale: `set_attn_implementation` reaches the model's config only, and a copied config
    would then meet masks made for another back end (wrong tokens, no error).
    """

    def __init__(self, base: Any, **changes: Any) -> None:
        self.__dict__["_base"], self.__dict__["_changes"] = base, changes

    def __getattr__(self, name: str) -> Any:
        changes = self.__dict__["_changes"]
        return changes[name] if name in changes else getattr(self.__dict__["_base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot set {name!r} on a view; set it on the object itself")


def stock_attention(attention: nn.Module) -> AttentionFunction:
    """The attention function that this module would call by itself, by its present config.

    The back end is looked up at every call: masks are made for whatever `set_attn_implementation` chose last.
    """
    config: Any = attention.config
    modules = [sys.modules[kind.__module__] for kind in type(attention).__mro__]
    eager = next(module.eager_attention_forward for module in modules if hasattr(module, "eager_attention_forward"))

    def stock(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
        output: tuple[Tensor, Tensor | None] = interface(module, *args, **kwargs)
        return output

    return stock


def _dispatch(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    output: tuple[Tensor, Tensor | None] = module.config.microglia_attention(module, *args, **kwargs)
    return output


def with_attention(config: Any, function: AttentionFunction, **changes: Any) -> View:
    """A view of an attention layer's config by which the layer calls `function` (see `replaced_attention`)."""
    AttentionInterface.register(_NAME, _dispatch)
    return View(config, _attn_implementation=_NAME, microglia_attention=function, **changes)


@contextmanager
def replaced_attention(attention: nn.Module, function: AttentionFunction) -> Iterator[None]:
    """Let the module call `function(module, q, k, v, mask, **kwargs)` instead of its stock attention.

    q is `(B, H, T, D)`, k and v `(B, G, Tk, D)`, after rotary embedding and cache update. Only this module sees another
    config; masks are still made by the model for its own back end.
    """
    module: Any = attention
    config = module.config
    module.config = with_attention(config, function)
    try:
        yield
    finally:
        module.config = config
