"""One projection with some of its rows or columns: plain, offloaded, LoRA-adapted or quantised weights.

The one place that knows how weights are stored: nn.Linear keeps (out, in), GPT-2's Conv1D (in, out), peft wraps,
torchao quantises.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microglia.errors import MicrogliaError


@dataclass(frozen=True)
class Cut:
    """Rows (outputs) or columns (inputs) of one projection that stay."""

    projection: str
    index: Tensor
    of_inputs: bool


def weights_of_products(module: nn.Module) -> list[Tensor]:
    """The weights of all matrix products inside a module, itself included."""
    return [m.weight for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def linear_flops(module: nn.Module) -> int:
    """Operations of all linear layers for one token."""
    return sum(2 * weight.numel() for weight in weights_of_products(module))


def plain(projection: nn.Module) -> nn.Module:
    """The projection itself, without the LoRA layer that peft may have put around it."""
    return getattr(projection, "base_layer", projection)


def weight_dim(projection: nn.Module, *, of_inputs: bool) -> int:
    """The dimension of the stored weight that belongs to the inputs (columns), or to the outputs (rows)."""
    return int(of_inputs) ^ int(isinstance(plain(projection), Conv1D))


def features(projection: nn.Module, *, of_inputs: bool) -> int:
    """How many inputs, or outputs, a projection has; quantised weights say so by their module."""
    inner: Any = plain(projection)
    if isinstance(inner, Conv1D):
        return int(inner.nx if of_inputs else inner.nf)
    return int(inner.in_features if of_inputs else inner.out_features)


def oriented(projection: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The stored weight, or another tensor of its shape, as (out, in): a view."""
    stored = cast(Tensor, plain(projection).weight) if weight is None else weight
    return stored.T if weight_dim(projection, of_inputs=True) == 0 else stored


def float_weight(projection: nn.Module) -> Tensor:
    """The weight (out, in) in float32 as the projection applies it: brought in, dequantised, with LoRA."""
    inner = plain(projection)
    with torch.no_grad(), align_module_device(inner):
        stored: Any = inner.weight
        quantised = type(stored.data) not in (Tensor, nn.Parameter) and hasattr(stored.data, "dequantize")
        weight: Tensor = (stored.data.dequantize() if quantised else stored.detach()).float()
        if inner is not projection:
            every = Cut("", torch.arange(features(inner, of_inputs=True), device=weight.device), True)
            weight = weight + _lora_delta(projection, every, "the projection").float()
        return oriented(inner, weight)


def stored_tensors(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor is made of: several where torchao quantised it."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in stored_tensors(getattr(tensor, name))]
    return [tensor]


def tensor_bytes(tensor: Any) -> int:
    """Bytes that a tensor stores; of a quantised one, of the tensors that it is made of."""
    return sum(part.numel() * part.element_size() for part in stored_tensors(tensor))


def cut_bytes(projection: nn.Module, kept: int, *, of_inputs: bool) -> int:
    """Bytes of weight and bias that go when `kept` of the inputs, or outputs, stay."""
    inner: Any = plain(projection)
    whole = features(projection, of_inputs=of_inputs)
    parts = [inner.weight] if of_inputs or inner.bias is None else [inner.weight, inner.bias]
    return sum(tensor_bytes(part) * (whole - kept) // whole for part in parts)


def sliced(projection: nn.Module, cut: Cut, name: str = "the projection", block: int = 1) -> nn.Module:
    """A projection with the rows (outputs) or columns (inputs) of the cut only. LoRA on it is merged into the slice.

    The cut's indices come in whole aligned runs of `block`.

    Weights that torchao quantised in a plain layout (int8 weight-only, intx) stay quantised: integers and scales are
    gathered, nothing is rounded again. Raises MicrogliaError, naming the projection, for weights stored in other ways.
    """
    inner = plain(projection)
    dim = weight_dim(inner, of_inputs=cut.of_inputs)
    with torch.no_grad(), align_module_device(inner):  # brings offloaded weights in, for the slice only
        stored: Any = getattr(inner, "weight", None)
        if inner is projection and _is_torchao(stored):
            weight = _take_quantised(stored, dim, cut.index, block, name)
        else:
            check_plain(stored, inner, name)
            weight = _take(stored, dim, cut.index, block)
        if inner is not projection:
            weight = weight + _lora_delta(projection, cut, name).to(weight.dtype)
        bias: Any = inner.bias
        if bias is not None:
            bias = bias.clone() if cut.of_inputs else _take(bias, 0, cut.index, block)
    return resized(inner, weight, bias, len(cut.index), of_inputs=cut.of_inputs)


def resized(inner: nn.Module, weight: Tensor, bias: Tensor | None, size: int, *, of_inputs: bool) -> nn.Module:
    """A projection like `inner` with these parameters and `size` inputs or outputs; hooks stay behind."""
    if not isinstance(inner, nn.Linear | Conv1D):
        raise MicrogliaError(
            f"a projection is a {type(inner).__module__}.{type(inner).__name__}, of which nothing can be cut out; "
            "load the model without it (modules_to_save of peft, say) or use execution='masked'"
        )
    smaller = copy.copy(inner)
    for hooked in ("forward", "_hf_hook", "_old_forward"):  # accelerate's, which would fetch the whole weights again
        smaller.__dict__.pop(hooked, None)
    smaller._forward_hooks, smaller._forward_pre_hooks = OrderedDict(), OrderedDict()
    smaller._parameters = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in (("weight", weight), ("bias", bias))
    }
    names = ("nx", "nf") if isinstance(inner, Conv1D) else ("in_features", "out_features")
    setattr(smaller, names[0] if of_inputs else names[1], size)
    return smaller


def _take(x: Tensor, dim: int, index: Tensor, block: int) -> Tensor:
    """`x.index_select(dim, index)`, a run at a time.

    Columns of a bfloat16 matrix in a sixth of the time, rows in half.
    """
    taken: Tensor = x.unflatten(dim, (-1, block)).index_select(dim, index[::block] // block)
    return taken.flatten(dim, dim + 1)


def _is_torchao(weight: Any) -> bool:
    """Whether a weight is one of torchao's with integers (`qdata`) of the weight's own shape and a scale per block."""
    data: Any = getattr(weight, "data", None)
    if not type(data).__module__.startswith("torchao.") or getattr(data, "act_pre_scale", None) is not None:
        return False
    return hasattr(data, "qdata") and data.qdata.shape == data.shape


def _take_quantised(weight: Any, dim: int, index: Tensor, block: int, name: str) -> Tensor:
    """`_take` of a torchao weight: its integers and, where they differ along `dim`, its scales and zero points."""
    data = weight.data
    per_scale = list(data.block_size)  # how many rows and columns share a scale
    whole = per_scale[dim] >= data.shape[dim]
    if not whole and block % per_scale[dim]:
        raise MicrogliaError(
            f"{name} is quantised with one scale for every {per_scale[dim]} inputs, which runs of {block} that stay or "
            f"go would cut through; quantise with a group size that divides {block}, or use execution='masked'"
        )

    def scales(x: Tensor | None) -> Tensor | None:
        if x is None or whole or x.numel() == 1:
            return x
        return x.index_select(dim, index[:: per_scale[dim]] // per_scale[dim])

    names = [*data.tensor_data_names, *getattr(data, "optional_tensor_data_names", [])]
    names += [*data.tensor_attribute_names, *getattr(data, "optional_tensor_attribute_names", [])]
    per_scale[dim] = min(per_scale[dim], len(index))
    parts = {part: getattr(data, part) for part in names}
    parts |= {"qdata": _take(data.qdata, dim, index, block), "block_size": type(data.block_size)(per_scale)}
    parts |= {part: scales(parts[part]) for part in ("scale", "zero_point") if part in parts}
    result: Tensor = type(data)(**parts)
    return result


INSTEAD = (
    "compaction needs float weights or torchao's int8 weight-only ones, load the model in another way or use "
    "execution='masked'"
)


def check_plain(weight: Any, inner: nn.Module, name: str, instead: str = INSTEAD) -> None:
    """Raise MicrogliaError, which ends with what to do instead, unless a weight is a plain tensor of floats."""
    if type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor or not weight.is_floating_point():
        kind = type(inner).__name__ if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        raise MicrogliaError(f"{name} stores its weight as {kind}, of which nothing can be cut out here; {instead}")


def _lora_delta(projection: Any, cut: Cut, name: str) -> Tensor:
    """What the active LoRA adapters add to the sliced weight."""
    total: Tensor = torch.zeros(())
    if not hasattr(projection, "lora_A"):
        raise MicrogliaError(
            f"{name} is adapted by {type(projection).__module__}, of which nothing can be cut out; use LoRA or merge "
            "the adapter first, model = model.merge_and_unload()"
        )
    # A merged adapter is in the base weight already.
    active = [] if projection.disable_adapters or projection.merged else projection.active_adapters
    for adapter in active:
        if adapter not in projection.lora_A:
            continue
        if adapter in projection.lora_variant or projection.lora_B[adapter].bias is not None:
            raise MicrogliaError(
                f"{name} has the adapter {adapter!r}, which is more than plain LoRA (DoRA or lora_bias, say); merge it "
                "first, model = model.merge_and_unload()"
            )
        down, up = projection.lora_A[adapter].weight, projection.lora_B[adapter].weight  # (r, in), (out, r)
        if cut.of_inputs:
            down = down.index_select(1, cut.index)
        else:
            up = up.index_select(0, cut.index)
        delta = (up @ down) * projection.scaling[adapter]
        total = total.to(delta) + (delta.T if projection.fan_in_fan_out else delta)
    return total
