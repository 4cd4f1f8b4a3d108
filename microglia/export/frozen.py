"""The model with the heads of a plan only: LoRA merged, weights cut, nothing left to decide."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, causal_lm
from microglia.errors import UnsupportedModelError
from microglia.execution import Compact, Decision
from microglia.export.plan import KeepPlan
from microglia.recovery import Recovery
from microglia.units import find_sites

Written = tuple[float | None, list[str]]  # the largest difference of what was read back, if it was; what is lost


@contextmanager
def frozen(model: nn.Module, plan: KeepPlan, recovery: Recovery | None = None) -> Iterator[Any]:
    """While inside, the model reads and writes with the plan's heads alone. Leaving restores it bit for bit.

    recovery: then it also reads with what was meant for writing, as a frozen model has one set of weights.
    """
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    with ExitStack() as stack:
        if recovery is not None:
            stack.enter_context(recovery.applied(lm, merged=True))
        stack.enter_context(Compact().apply(find_sites(lm), Decision([k[None].to(device) for k in plan.keep])))
        yield lm


def merged(model: nn.Module) -> Any:
    """The Hugging Face model itself; with LoRA, a copy that has the adapter in its weights.

    Raises UnsupportedModelError for weights that cannot be written as they are: quantised or offloaded ones.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    lm = causal_lm(model)
    for name, parameter in lm.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is offloaded, so it cannot be written; load the whole model on one device"
            )
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{name} is quantised ({type(parameter.data).__name__} of {parameter.dtype}), and an export writes "
                "float weights; export without quantize and quantise the exported model"
            )
    return lm


def probe(lm: Any, length: int = 16) -> Tensor:
    """Token ids (1, length) that exist in every vocabulary, for comparing two forms of one model."""
    return (torch.arange(1, length + 1, device=lm.device) * 7919 % Anatomy(lm).vocab_size)[None]


@torch.inference_mode()
def probe_logits(lm: Any) -> Tensor:
    """Logits (1, T, V) of the probe."""
    return lm(input_ids=probe(lm), use_cache=False).logits
