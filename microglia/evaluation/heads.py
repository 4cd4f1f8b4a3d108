"""What happened to every head over many prompts: how often it was kept, and the mean of its signals."""

from collections.abc import Mapping, Sequence

from torch import Tensor


class HeadMeans:
    """Means over the prompts added so far, per site and unit."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.prompts = 0

    def add(self, keep: Sequence[Tensor], signals: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep (B, H) and signals (B, H) of every site, for B more prompts; nothing when the model stayed dense."""
        if not keep:
            return
        names = dict.fromkeys(name for site in signals for name in site)  # sites of each kind have signals of their own
        per_site = {"kept": list(keep)} | {name: [site[name] for site in signals if name in site] for name in names}
        self._add({name: [x.double().sum(0).cpu() for x in values] for name, values in per_site.items()}, len(keep[0]))

    def add_all(self, other: "HeadMeans") -> None:
        """Everything that was added to another."""
        self._add(other.sums, other.prompts)

    def _add(self, sums: Mapping[str, list[Tensor]], prompts: int) -> None:
        self.prompts += prompts
        for name, values in sums.items():
            before = self.sums.get(name)
            self.sums[name] = values if before is None else [a + b for a, b in zip(before, values, strict=True)]

    def as_json(self) -> dict[str, list[list[float]]]:
        """`kept` (share of the prompts) and every signal: a list of heads per site; empty without prompts."""
        return {
            name: [[round(value, 6) for value in (x / self.prompts).tolist()] for x in sums]
            for name, sums in self.sums.items()
        }
