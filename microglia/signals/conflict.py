"""Heads that pull against the rest: the cosine of what a head adds with what the others of its layer add."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.anatomy.projection import float_weight
from microglia.signals.base import Prompt, Signal
from microglia.units import HeadSite, Site


def conflict(outputs: Tensor, columns: Tensor) -> Tensor:
    """Cosine of each head's contribution with the sum of the others', per token.

    outputs: (B, T, H, D), what the heads give to the output projection. columns: (H, D, out), its columns by head.
    Returns (B, T, H) in float32: below 0, the head works against the rest. A head alone has 0.
    """
    outputs, columns = outputs.float(), columns.float()
    whole = torch.einsum("bthd,hdo->bto", outputs, columns)
    with_whole = (outputs * torch.einsum("bto,hdo->bthd", whole, columns)).sum(-1)  # c_h · Σ c
    gram = columns @ columns.transpose(1, 2)  # (H, D, D): c_h² without c_h, which has the model's width
    own = torch.einsum("bthd,hde,bthe->bth", outputs, gram, outputs)
    rest = whole.square().sum(-1, keepdim=True) - 2 * with_whole + own
    product = own.clamp(min=0).sqrt() * rest.clamp(min=0).sqrt()
    return torch.where(product > 1e-12, (with_whole - own) / product.clamp(min=1e-12), 0.0).clamp(-1, 1)


class Conflict(Signal):
    """Mean over the prompt's tokens of that cosine, (B, H)."""

    name: ClassVar[str] = "conflict"
    unit: ClassVar[str] = "head"

    @contextmanager
    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> Iterator[None]:
        assert isinstance(site, HeadSite)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
                columns = site.split(float_weight(site.output)).permute(1, 2, 0)  # (out, H, D) → (H, D, out)
                cosines = conflict(site.split(inputs[0]), columns)
                put((cosines * prompt.weight[..., None]).sum(1) / prompt.count)

        handle = site.output.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def score(self, values: Tensor) -> Tensor:
        """Heads that agree with the others stay."""
        return values
