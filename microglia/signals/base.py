"""What a signal is: one number per unit and prompt, gathered while the prompt is read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from microglia.registry import Registry
from microglia.signals.queries import Queries
from microglia.units import Site


def token_count(tokens: Tensor) -> Tensor:
    """Prompt tokens of each row, at least 1: (B, T) → (B, 1)."""
    return tokens.sum(1, keepdim=True).clamp(min=1)


class Prompt:
    """The tokens of the prompts being read, and what all sites share of them.

    tokens: (B, T), true at prompt tokens. window: entropy over the last so many prompt queries, None for all.
    """

    def __init__(self, tokens: Tensor, window: int | None) -> None:
        self.tokens, self.window = tokens, window
        self.weight = tokens.float()
        self.count = token_count(self.weight)  # (B, 1)

    @cached_property
    def queries(self) -> Queries:
        return Queries(self.tokens, self.window)


class Signal(ABC):
    """One statistic of a prompt. To add one: a subclass with an instance in SIGNALS.

    name: in the registry. unit: the kind of unit that it is measured at. usual: whether policies that decide about such
    units see it unless something else is asked for.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    usual: ClassVar[bool] = False

    @abstractmethod
    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> AbstractContextManager[object]:
        """While inside, the forward pass that reads the prompt calls `put` with (B, U), or what becomes it."""

    def finish(self, values: Sequence[Any]) -> list[Tensor]:
        """What `put` got at every site of the signal → (B, U) of every site."""
        return list(values)

    @abstractmethod
    def score(self, values: Tensor) -> Tensor:
        """(B, U) of a site → scores, higher = keep, comparable between sites."""


SIGNALS: Registry[Signal] = Registry("signals")
