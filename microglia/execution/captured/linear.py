"""Products of a step with a single row. The library's kernels are made for many rows and read such weights slower."""

from collections.abc import Iterable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.anatomy import swap
from microglia.execution.captured import kernels


@torch.library.custom_op("microglia::product_of_one_row", mutates_args=())
def of_one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (1, 1, K), weight (N, K) → (1, 1, N). One operation to a compiler and to a tape."""
    if kernels.usable(x.device) and weight.is_contiguous():
        from microglia.execution.captured.kernels.products import product  # Triton may be missing

        return product(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


@of_one_row.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def one_row_at_a_time(stack: ExitStack, modules: Iterable[nn.Module]) -> None:
    """Until `stack` closes, plain linear layers among the modules make products with one row by `of_one_row`."""
    for module in modules:
        if type(module) is nn.Linear and module.weight.is_floating_point():
            swap(stack, module, "forward", MethodType(_forward, module))


def _forward(module: Any, x: Tensor) -> Tensor:
    if x.shape[:-1].numel() != 1:
        return F.linear(x, module.weight, module.bias)
    output: Tensor = of_one_row(x, module.weight, module.bias)
    return output
