"""What pruned heads leave behind: their mean output over the prompt, folded into a bias after the output projection."""

from collections.abc import Callable

import torch
from torch import Tensor

from microglia.sites import Site


def left_behind(site: Site, keep: Tensor, fill: Tensor) -> Tensor:
    """What the pruned heads' `fill` (B, H, D) adds after the output projection: one bias per row, (B, 1, hidden).

    `keep` (B, H) or (1, H). The projection must be the dense one.
    """
    with torch.no_grad():
        left = (fill * (1 - keep)[..., None].to(fill.dtype)).flatten(-2)[:, None]  # (B, 1, H·D)
        return site.output(left) - site.output(torch.zeros_like(left))  # without the projection's own bias


def adder(bias: Tensor) -> Callable[..., Tensor]:
    """A forward hook that adds `bias` to a module's output."""
    return lambda module, inputs, output: output + bias
