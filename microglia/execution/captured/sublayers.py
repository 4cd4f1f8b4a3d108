"""What a step computes of a layer that lost its attention, its MLP or both, and what stands around a projection."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from microglia.anatomy import Layer, swap

Compiler = Callable[..., Any] | None


def forward_of(layer: Layer, gone: tuple[bool, bool], compiler: Compiler) -> Callable[..., Tensor]:
    """The forward pass of a layer without its attention, its MLP, or both, as `gone` says.

    Nothing is launched for what is gone: neither is zero computed and added, as it would be if only the two halves were
    replaced. The layer must be nothing but norms and halves (`Family.steps`).
    """
    compiled = (lambda function: function) if compiler is None else compiler
    if not any(gone):
        whole: Callable[..., Tensor] = compiled(layer.module.forward)
        return whole
    if all(gone):
        return lambda hidden, *_, **__: hidden
    half, alone = gone.index(False), compiled(_alone)
    before, *after = layer.norms_around(half)
    names = list(inspect.signature(layer.module.forward).parameters)[1:]  # the first one is the hidden states

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = {} if half else {**dict(zip(names, args, strict=False)), **kwargs}
        result: Tensor = alone(layer.halves[half], before, after, hidden, inputs)
        return result

    return forward


def _alone(
    half: nn.Module, before: nn.Module, after: list[nn.Module], hidden: Tensor, inputs: dict[str, Any]
) -> Tensor:
    """One half of a layer on the residual stream (B, 1, hidden)."""
    given = half(before(hidden), **inputs)
    added: Tensor = given[0] if isinstance(given, tuple) else given
    for norm in after:
        added = norm(added)
    return hidden + added


@dataclass(frozen=True, eq=False)
class Around:
    """What a decision adds to a module: its input times `gate`, its output plus `bias`, and all that times `scale`.

    gate: (B, 1, k). bias: (B, 1, hidden), what pruned units left behind. scale: (B, 1, 1), whether a row has the
    sublayer. None of each is nothing.
    """

    gate: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None


def put_around(stack: ExitStack, owner: nn.Module, name: str, around: Around) -> None:
    """Until the stack closes, the module `name` of an owner has something around it; nothing changes for nothing."""
    if any(part is not None for part in (around.gate, around.bias, around.scale)):
        swap(stack, owner, name, _Surrounded(getattr(owner, name), around))


class _Surrounded(nn.Module):
    def __init__(self, inner: nn.Module, around: Around) -> None:
        super().__init__()
        self.inner, self.gate, self.bias, self.scale = inner, around.gate, around.bias, around.scale

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x if self.gate is None else x * self.gate)
        output = output if self.bias is None else output + self.bias
        return output if self.scale is None else output * self.scale
