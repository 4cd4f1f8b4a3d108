"""What happened to every unit over many prompts: how often it was kept, and the mean of its signals."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT = {"head": "kept"}  # the name under which it stands; else the unit's own before it


class HeadMeans:
    """Means over the prompts added so far, per site and unit."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.prompts = 0

    def add(
        self, keep: Sequence[Tensor], signals: Sequence[Mapping[str, Tensor]], units: Sequence[str] | None = None
    ) -> None:
        """Keep (B, U) and signals (B, U) of every site, for B more prompts; nothing when the model stayed dense.

        units: the kind of every site, heads where it is not said.
        """
        if not keep:
            return
        kinds = [KEPT.get(unit, f"{unit}_kept") for unit in units or ["head"] * len(keep)]
        names = dict.fromkeys(name for site in signals for name in site)  # sites of each kind have signals of their own
        kept = {kind: [k for k, its in zip(keep, kinds, strict=True) if its == kind] for kind in dict.fromkeys(kinds)}
        per_site = kept | {name: [site[name] for site in signals if name in site] for name in names}
        self._add({name: [x.double().sum(0).cpu() for x in values] for name, values in per_site.items()}, len(keep[0]))

    def _add(self, sums: Mapping[str, list[Tensor]], prompts: int) -> None:
        self.prompts += prompts
        for name, values in sums.items():
            before = self.sums.get(name)
            self.sums[name] = values if before is None else [a + b for a, b in zip(before, values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The sums as they are, for a ledger."""
        return {"prompts": self.prompts, "sums": {name: [x.tolist() for x in sums] for name, sums in self.sums.items()}}

    def add_json(self, row: Mapping[str, Any]) -> None:
        """Everything that was added to another, from its `to_json`."""
        sums = {name: [torch.tensor(x, dtype=torch.float64) for x in xs] for name, xs in row["sums"].items()}
        self._add(sums, row["prompts"])

    def as_json(self) -> dict[str, list[list[float]]]:
        """`kept` (share of the prompts; of other units than heads `channel_kept`, say) and every signal.

        Each is a list of units per site; empty without prompts.
        """
        return {
            name: [[round(value, 6) for value in (x / self.prompts).tolist()] for x in sums]
            for name, sums in self.sums.items()
        }
