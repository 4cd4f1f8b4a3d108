"""Bytes of a decode step, unit by unit: what a budget buys. Decisions in, bytes out; gradients go through."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class UnitCosts:
    """Of one site: bytes of each unit (U,), and of each group (G,) of neighbouring units, in float64.

    A group's bytes are read while any of its units stays (keys and values of a group of heads); (0,) where none are.
    """

    units: Tensor
    groups: Tensor

    @classmethod
    def of_units(cls, units: Tensor) -> "UnitCosts":
        """Units that share nothing."""
        return cls(units.double(), torch.zeros(0, dtype=torch.float64))

    @property
    def whole(self) -> float:
        """Bytes of all units."""
        return float(self.units.sum() + self.groups.sum())

    def kept(self, keep: Tensor) -> Tensor:
        """Decisions (B, U) → the bytes that they read, (B,)."""
        keep = keep.to(self.units.dtype)
        total = keep @ self.units.to(keep.device)
        if len(self.groups):
            total = total + keep.unflatten(-1, (len(self.groups), -1)).amax(-1) @ self.groups.to(keep.device)
        return total


@dataclass(frozen=True, eq=False)
class StepCosts:
    """Of a whole decode step: what the sites' units read, and `fixed`, which no decision changes.

    batch, context: rows of the step and tokens in their cache, for which keys and values are counted.
    """

    sites: Sequence[UnitCosts]
    fixed: float
    batch: int = 1
    context: int = 0

    @property
    def whole(self) -> float:
        """Bytes of a dense step."""
        return self.fixed + sum(site.whole for site in self.sites)

    def kept_bytes(self, keep: Sequence[Tensor]) -> Tensor:
        """Keeps (B, U) of every site → bytes of a step with them, (B,); for rows that share the decision."""
        return torch.stack([site.kept(k) for site, k in zip(self.sites, keep, strict=True)]).sum(0) + self.fixed

    def share(self, keep: Sequence[Tensor]) -> Tensor:
        """Keeps (B, U) of every site → share of the dense step's bytes that they read, (B,)."""
        return self.kept_bytes(keep) / self.whole
