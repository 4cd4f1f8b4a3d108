"""The output head apart from the layers, for whoever needs the logits of a part of the positions at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy.anatomy import causal_lm


@contextmanager
def headless(model: nn.Module) -> Iterator[list[Tensor]]:
    """While inside, passes compute no logits. Yields the final states (B, T, hidden) of each pass, as they come."""
    states: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:])

    handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(take)
    try:
        yield states
    finally:
        handle.remove()


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """Final states (..., hidden) → logits (..., V), as the model itself makes them."""
    lm = causal_lm(model)
    logits: Tensor = lm.get_output_embeddings()(states)
    cap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
