"""The product of one row with a weight, no more than reading the weight: each program reads some rows of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 1024  # inputs: with 4 outputs 8 KiB of the weight are on their way to every program
PROGRAMS = 6  # on each multiprocessor, at least, so that enough is on its way to all of them


@triton.jit
def _product(
    x, weight, bias, output, outputs,
    BIAS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of x (INPUTS,), from as many rows of the weight (outputs, INPUTS); summed in float32."""
    n, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, AT_ONCE)
    start = weight + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    total = tl.zeros([ROWS, AT_ONCE], tl.float32)
    for first in range(0, INPUTS, AT_ONCE):
        inside = first + k < INPUTS
        w = tl.load(start + first, mask=inside[None, :] & (n[:, None] < outputs), other=0.0)
        a = tl.load(x + first + k, mask=inside, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(output + n, result.to(output.dtype.element_ty), mask=n < outputs)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `linear.of_one_row`."""
    inputs, outputs = x.shape[-1], len(weight)
    output = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    cuda = x.device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 1
    rows = 8 if outputs >= 8 * PROGRAMS * multiprocessors else 4
    _product[(triton.cdiv(outputs, rows),)](
        x, weight, weight if bias is None else bias, output, outputs,
        BIAS=bias is not None, INPUTS=inputs, ROWS=rows, AT_ONCE=AT_ONCE, num_warps=4,
    )  # fmt: skip
    return output
