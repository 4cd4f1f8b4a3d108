"""A pass of the same model in float64: what float32 runtimes are judged against, because each rounds in its own way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

MULTIPLE = 4  # of torch's own difference to float64: how far another right runtime may be away
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the largest logit: torch's may be smaller by luck


@torch.inference_mode()
def float64_logits(lm: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of unpadded ids. The model is not changed; while this runs, its weights exist once more."""
    state = {
        name: x.double() if x.is_floating_point() else x for name, x in (*lm.named_parameters(), *lm.named_buffers())
    }
    with _Float64():
        logits: Tensor = functional_call(lm, state, kwargs={"input_ids": ids, "use_cache": False}).logits
    return logits


@torch.inference_mode()
def float32_allowance(lm: Any, ids: Tensor, exact: Tensor) -> float:
    """How far logits of the float32 model `lm` may be from the `exact` ones in a runtime that computes it rightly.

    Where the best token leads by more than twice as much, such a runtime says the same token.
    """
    difference = float((lm(input_ids=ids, use_cache=False).logits - exact).abs().max())
    return MULTIPLE * max(difference, ROUNDING * max(1.0, float(exact.abs().max())))


class _Float64(TorchFunctionMode):
    """What a model's code casts to float32 (norms, rotary embeddings, softmax) becomes float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        function = Tensor.double if function is Tensor.float else function
        return function(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
