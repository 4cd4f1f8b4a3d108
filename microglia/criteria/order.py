"""The order of channels from which blocks are cut: those that matter alike stand together."""

from dataclasses import replace

import torch

from microglia.criteria.base import Criterion
from microglia.criteria.calibration import Calibration, untouched
from microglia.criteria.norm import Norm
from microglia.errors import ConfigError
from microglia.units import Arrangement


def ordered_channels(calibration: Calibration, criterion: Criterion | None = None, *, run: int = 1) -> Arrangement:
    """The calibration's arrangement with the channels of every layer ordered by a criterion, the best first.

    criterion: any that scores channels; None is what they add to the residual stream at answer tokens. run: neighbours
    in the file that stay neighbours, for weights that are quantised with one scale for so many inputs.
    Raises ConfigError where the channels of a layer are no multiple of the run.
    """
    arrangement = replace(calibration.arrangement, orders=None)
    single = replace(calibration, units=("channel",), arrangement=replace(arrangement, block=1, shared=0.0))
    criterion = Norm(projected=True) if criterion is None else criterion
    criterion.check_units(single)
    with untouched(single):
        scores = [x.detach().float().cpu() for x in criterion.scores(single)]
    if wrong := [len(x) for x in scores if len(x) % run]:
        raise ConfigError(f"run={run} was given, but a layer has {wrong[0]} channels; give a divisor of that")
    orders = []
    for x in scores:
        runs = x.view(-1, run).sum(-1).argsort(descending=True, stable=True)
        orders.append((runs[:, None] * run + torch.arange(run)).flatten())
    return replace(arrangement, orders=orders)
