"""Weights rounded to 8 or 4 bits, as the step's products read them. Round to nearest.

8 bits: one scale for a stored row. 4 bits: one for GROUP numbers along it, chosen so that the largest of them is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True, eq=False)
class Quantised:
    """Rows of integers, and their scales in float32: (R, 1), or (R, L / GROUP) for 4 bits, of which two make a byte."""

    numbers: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.numbers.dtype == torch.int8 else 4


def quantised(weight: Tensor, bits: int) -> Quantised:
    """Rows (R, L) of weights. Those whose length is no multiple of GROUP get 8 bits."""
    if bits == 4 and weight.shape[1] % GROUP == 0:
        return _in_four(weight)
    scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return Quantised((weight.float() / scales).round().to(torch.int8), scales)


def _in_four(weight: Tensor) -> Quantised:
    groups = weight.float().unflatten(1, (-1, GROUP))  # (R, G, 32)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = largest / -8  # the largest becomes -8, which is exact; its opposite would not be there
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    numbers = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = numbers.split(GROUP // 2, 2)
    return Quantised((low | (high << 4)).flatten(1).contiguous(), scales[..., 0].contiguous())
