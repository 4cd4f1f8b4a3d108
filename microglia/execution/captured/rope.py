"""Rotary embeddings that change with the length: an answer keeps the frequencies that its prompt was read with.

The library finds them anew in every forward pass, by looking at the positions; a replay could not. Below a model's
original length they never change, and above it `longrope` has one other set. So only a request that crosses that
length, or a `dynamic` one beyond it, has no captured step.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import rope_types, swap
from microglia.errors import UnsupportedModelError

MOVING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rotary:
    """One set of frequencies: the module and the name that hold it, its kind, and the length after which it changes."""

    module: nn.Module
    name: str
    kind: str
    limit: int
    held: Tensor  # what captured steps read; it never moves

    def check(self, prompt: int, new_tokens: int) -> None:
        """Raise UnsupportedModelError if the frequencies change within a request of so many tokens."""
        last = prompt + new_tokens - 1  # the last new token is never read
        if last <= self.limit or (self.kind == "longrope" and prompt > self.limit):
            return
        raise UnsupportedModelError(
            f"{prompt} tokens of prompt and {new_tokens} new ones cross the length of {self.limit} at which this "
            f"model changes its rotary embedding ({self.kind}), which captured steps cannot follow; ask for fewer "
            "tokens or use execution='compact'"
        )

    def hold(self) -> None:
        """Keep the frequencies of the prompt that was just read."""
        self.held.copy_(getattr(self.module, self.name))

    def install(self, stack: ExitStack) -> None:
        """Until the stack closes, the embedding is made from what is held, and nothing looks at lengths."""
        plain = inspect.unwrap(type(self.module).forward)  # without the update of frequencies around it
        swap(stack, self.module, "forward", partial(plain, self.module))
        swap(stack, self.module, self.name, self.held)


def rotaries(lm: nn.Module) -> list[Rotary]:
    """Every set of frequencies of a model that changes with the length; of most models none."""
    return [rotary for module in lm.modules() for rotary in _sets(module)]


def _sets(module: Any) -> Iterator[Rotary]:
    for layer_type, kind in rope_types(module).items():
        if kind not in MOVING:
            continue
        if not hasattr(type(module).forward, "__wrapped__"):
            raise UnsupportedModelError(
                f"the {kind} rotary embedding of {type(module).__name__} cannot be held still in this version of "
                "transformers; use execution='compact'"
            )
        parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
        limit = parameters["original_max_position_embeddings"] if kind == "longrope" else module.original_max_seq_len
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        with torch.inference_mode(False):
            yield Rotary(module, name, kind, int(limit), getattr(module, name).detach().clone())
