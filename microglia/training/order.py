"""The order of an epoch's examples, which a run that goes on in the middle of that epoch must find again.

transformers draws it from the process's random numbers when the epoch begins, but what it saves with a checkpoint is
where they stand later: gone on with from there, an epoch would go through its examples in another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

ORDER = "order.safetensors"


@dataclass
class Order:
    """start: the state of the random numbers when the epoch's order was drawn; again: the state to draw it from now."""

    start: Tensor | None = None
    again: Tensor | None = None


class Ordered(Sampler):
    """A sampler that remembers in `order` where its random numbers stood, or starts from where they stood before."""

    def __init__(self, sampler: Sampler, order: Order) -> None:
        self.sampler, self.order = sampler, order

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        if self.order.again is not None:
            torch.set_rng_state(self.order.again)
            self.order.again = None
        self.order.start = torch.get_rng_state()
        return iter(self.sampler)
