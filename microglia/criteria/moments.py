"""Mean and variance of what every head or channel writes at the answers' tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.anatomy.projection import features
from microglia.criteria.calibration import Calibration
from microglia.units import ProjectedSite


@dataclass(frozen=True)
class Moments:
    """mean and variance (U, D) in float64 of one site's outputs over `count` tokens."""

    count: int
    mean: Tensor
    variance: Tensor

    def joined(self, outputs: Tensor) -> "Moments":
        """With (N, U, D) more outputs; merged as in Chan et al. 1983, for sums of squares would lose the digits."""
        new = outputs.double()
        mean, variance, n = new.mean(0), new.var(0, correction=0), len(new)
        total = self.count + n
        shift = mean - self.mean
        spread = self.variance * self.count + variance * n + shift**2 * self.count * n / total
        return Moments(total, self.mean + shift * n / total, spread / total)


def moments(calibration: Calibration) -> list[Moments]:
    """Moments of every site's outputs, on the CPU."""
    nothing = [site.split(torch.zeros(features(site.output, of_inputs=True))) for site in calibration.projected]
    totals = [Moments(0, x, x) for x in nothing]

    def add(site: ProjectedSite, outputs: Tensor) -> None:
        totals[site.index] = totals[site.index].joined(outputs.cpu())

    calibration.visit_outputs(add)
    return totals
