"""Shapley values: what a head adds, on average over the orders in which heads could be taken away."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, check_positive
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError


@CRITERIA.register("shapley")
@dataclass(frozen=True, kw_only=True)
class Shapley(Criterion):
    """Mean fall of the negative answer loss when the head goes, over random orders, each on one batch of examples.

    permutations: orders per batch. tolerance: an order ends when the loss has come within this share of the way to
    that without any head; heads that are left then add nothing. 0 never ends early.
    """

    permutations: int = 4
    tolerance: float = 0.02

    name: ClassVar[str] = "shapley"
    score: ClassVar[str] = "Monte-Carlo Shapley value of the head for the negative answer loss"
    paper: ClassVar[str] = "Held & Yang 2023, Shapley Head Pruning; truncated as Ghorbani & Zou 2019"
    departs: ClassVar[str] = "answer loss in place of accuracy; a fixed number of orders in place of a bandit's bounds"
    units: ClassVar[tuple[str, ...]] = ("head", "channel", "sublayer")
    together: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(permutations=self.permutations)
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance} was given; it must be 0 or more and below 1")

    def orders(self, heads: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The orders (heads,) in which heads are taken away from one batch."""
        for _ in range(self.permutations):
            yield torch.randperm(heads, generator=generator)

    @torch.no_grad()
    def scores(self, calibration: Calibration) -> list[Tensor]:
        generator = torch.Generator().manual_seed(calibration.seed)
        sizes = [g.count for g in calibration.geometries]
        total, weight = torch.zeros(sum(sizes), dtype=torch.float64), 0.0
        for batch in calibration.batches:
            prompt, rows = calibration.read(batch), len(batch.prompt)

            def value(keep: Tensor, batch=batch, prompt=prompt) -> float:
                return -float(calibration.losses(batch, keep[None].split(sizes, -1), prompt=prompt).mean())

            everything = torch.ones(sum(sizes), device=batch.prompt.device)
            full, empty = value(everything), value(torch.zeros_like(everything))
            for order in self.orders(sum(sizes), generator):
                keep, before = everything.clone(), full
                for head in order.tolist():
                    if abs(before - empty) < self.tolerance * abs(full - empty):
                        break
                    keep[head] = 0
                    after = value(keep)
                    total[head] += rows * (before - after)
                    before = after
                weight += rows
        return list((total / weight).split(sizes))
