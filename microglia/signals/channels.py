"""How much the channels of an MLP take part in a prompt: their activations, alone and as down writes them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.anatomy.projection import float_weight
from microglia.signals.base import Prompt, Signal
from microglia.units import ChannelSite, Site


class ChannelSignal(Signal):
    """A signal of the channels' activations, the input of the down projection; of a block, the root of its squares."""

    unit: ClassVar[str] = "channel"

    @abstractmethod
    def squares(self, site: ChannelSite, activations: Tensor, prompt: Prompt) -> Tensor:
        """Activations (B, T, I) → a square of every channel, (B, I)."""

    @contextmanager
    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> Iterator[None]:
        assert isinstance(site, ChannelSite)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
                put(site.split(self.squares(site, inputs[0].float(), prompt)).sum(-1).sqrt())

        handle = site.output.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def score(self, values: Tensor) -> Tensor:
        """Relative to the site's mean: activations grow with depth."""
        return values / values.mean(-1, keepdim=True).clamp(min=1e-20)


def mean_squares(activations: Tensor, prompt: Prompt, per_token: Tensor | None = None) -> Tensor:
    """Mean over prompt tokens of the squares of activations (B, T, I), weighed `per_token` (B, T): (B, I)."""
    weight = prompt.weight if per_token is None else prompt.weight * per_token
    return torch.einsum("bti,bt->bi", activations.square(), weight) / prompt.count


class Activation(ChannelSignal):
    """Share of a token's activation norm that is the block's, root mean square over the prompt (Dong et al. 2024,
    GRIFFIN, whose statistic is the same sum, not divided by the number of tokens).
    """

    name: ClassVar[str] = "activation"
    usual: ClassVar[bool] = True

    def squares(self, site: ChannelSite, activations: Tensor, prompt: Prompt) -> Tensor:
        return mean_squares(activations, prompt, 1 / activations.square().sum(-1).clamp(min=1e-20))


class Contribution(ChannelSignal):
    """Activation × norm of the channel's column of down, what reaches the residual stream; root mean square."""

    name: ClassVar[str] = "contribution"
    usual: ClassVar[bool] = True

    def squares(self, site: ChannelSite, activations: Tensor, prompt: Prompt) -> Tensor:
        columns = float_weight(site.output).square().sum(0)  # (I,)
        return mean_squares(activations, prompt) * columns
