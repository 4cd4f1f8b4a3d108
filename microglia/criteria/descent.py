"""Gradient descent over calibration batches, for criteria whose parameters are no policy."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from microglia.criteria.calibration import Calibration
from microglia.passes import Batch


def turns(calibration: Calibration, steps: int) -> Iterator[tuple[float, Batch]]:
    """`steps` times (share of the steps done, the next batch), again from the first when all had their turn."""
    for step in range(steps):
        yield step / steps, calibration.batches[step % len(calibration.batches)]


def descend(
    calibration: Calibration,
    parameters: Sequence[Tensor],
    loss: Callable[[Batch], Tensor],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Minimise `loss(batch)` over the parameters with Adam, in place."""
    optimiser = torch.optim.Adam(parameters, learning_rate)
    for _, batch in turns(calibration, steps):
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()
