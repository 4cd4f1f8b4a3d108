"""How little a sublayer changes: the cosine between the residual stream before and after it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from microglia.signals.base import Prompt, Signal
from microglia.units import Site


class Cosine(Signal):
    """Mean over prompt tokens of the cosine between a sublayer's input and its input with what it adds, (B, 2).

    One minus it is the block influence of ShortGPT (Men et al. 2024), of attention and MLP each.
    """

    name: ClassVar[str] = "cosine"
    usual: ClassVar[bool] = True
    unit: ClassVar[str] = "sublayer"

    @contextmanager
    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> Iterator[None]:
        stream: list[Tensor] = []  # the residual stream before attention
        found: list[Tensor] = []

        def begin(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            stream[:] = [args[0] if args else options["hidden_states"]]
            found.clear()

        def after(_: Any, __: Any, output: Any) -> None:
            with torch.no_grad():
                before = stream[0]
                stream[0] = before + (output[0] if isinstance(output, tuple) else output)
                cosine = F.cosine_similarity(before.float(), stream[0].float(), dim=-1)  # (B, T)
                found.append((cosine * prompt.weight).sum(1, keepdim=True) / prompt.count)
                if len(found) == 2:
                    put(torch.cat(found, -1))

        with ExitStack() as stack:
            layer = site.layer
            stack.callback(layer.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for module in layer.contributions:
                stack.callback(module.register_forward_hook(after).remove)
            yield

    def score(self, values: Tensor) -> Tensor:
        """What changes most stays."""
        return 1 - values
