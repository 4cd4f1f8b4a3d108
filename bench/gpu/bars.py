"""What was promised of a GPU (bfloat16, random weights where nothing else is said), beside what was measured.

Reads records as JSON has them and needs no torch, so that the pages' tables say the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
COMPILED = "hf static compiled"


@dataclass(frozen=True)
class Bar:
    """One promise. value: what was measured, None where nothing was; at_most: whether less is better.

    unit: `×` for times as fast, `%` for shares, `steps` for a time in steps.
    """

    what: str
    bar: float
    value: float | None
    unit: str = "×"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "kept" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "MISSED"

    @property
    def asked(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.figure(self.bar)}"

    @property
    def measured(self) -> str:
        return "" if self.value is None else self.figure(self.value)

    def figure(self, value: float) -> str:
        """A number in this bar's unit."""
        if self.unit == "%":
            return f"{value:.1%}"
        return f"{value:.2f}{'×' if self.unit == '×' else f' {self.unit}'}"

    def __str__(self) -> str:
        return f"{self.verdict:<12} {self.measured:>10} ({self.asked}) {self.what}"


def decoded(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, list[Row]]]:
    """(shape, layers, batch, context) → variant → its records, one for each way, the fastest first."""
    places: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["name"] == "gpu_decode":
            extra = row["extra"]
            place = extra["shape"], extra["layers"], extra["batch"], extra["context"]
            places.setdefault(place, {}).setdefault(extra["variant"], {})[extra.get("way", "")] = row
    return {
        place: {name: sorted(ways.values(), key=lambda row: row["value"]) for name, ways in variants.items()}
        for place, variants in places.items()
    }


def speed(variants: Mapping[str, Sequence[Row]], name: str, over: str = "dense") -> float | None:
    """How many times as fast as `over` a variant is, each in its fastest way.

    As fast as the dense step: in the variant's own way, measured in turn with it.
    """
    if name not in variants:
        return None
    paired = variants[name][0]["extra"].get("ratio_to_dense")
    if over == "dense" and paired is not None:
        return float(paired)
    if over not in variants:
        return None
    return float(variants[over][0]["value"] / variants[name][0]["value"])


def share(variants: Mapping[str, Sequence[Row]], name: str) -> float | None:
    """Of the time that the saved bytes allow to save, what a variant saved; see `realised_share`."""
    gained = speed(variants, name)
    best = variants[name][0]["extra"].get("ceiling") or 1.0 if name in variants else 1.0
    return None if gained is None or best <= 1 else (1 - 1 / gained) / (1 - 1 / best)


def steps_a_switch(variants: Mapping[str, Sequence[Row]], name: str) -> float | None:
    """How many of its steps a variant's switch takes."""
    if name not in variants:
        return None
    row = variants[name][0]
    return float(row["extra"]["switch_ms"] / row["value"])


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar of the GPU, on Phi-3-mini's shape."""
    places = decoded(rows)

    def at(batch: int, context: int) -> dict[str, list[Row]]:
        return places.get(("phi3-mini", 32, batch, context), {})

    one, eight, long = at(1, 512), at(8, 512), at(16, 4096)
    found = [
        Bar("dense step against the library's compiled one, 1 × 512", 1.3, speed(one, "dense", COMPILED)),
        Bar("75% of the heads, 1 × 512", 1.1, speed(one, "compact 0.75")),
        Bar("75% of the heads, 16 × 4,096", 1.2, speed(long, "compact 0.75")),
        Bar("75% of the heads, each row its own, 16 × 4,096", 1.15, speed(long, "rows 0.75")),
        Bar("75% of all bytes, heads and channels, 1 × 512", 1.25, speed(one, "head+channel 0.75")),
    ]
    for name in ("compact 0.75", "compact 0.5"):
        of = f"{float(name.split()[1]):.0%} of the heads"
        found += [
            Bar(f"share of the ceiling, {of}, {n} × 512", 0.9, share(v, name), "%") for n, v in ((1, one), (8, eight))
        ]
        found += [Bar(f"switch to {of}, 1 × 512", 1.0, steps_a_switch(one, name), "steps", at_most=True)]
    return [*found, *_reading(rows), *_elsewhere()]


def _reading(rows: Sequence[Row]) -> Iterator[Bar]:
    """Of a prompt of 2,048 tokens."""
    whole = {"shape": "phi3-mini", "layers": 32, "tokens": 2048}
    found = [r for r in rows if r["name"] == "gpu_looking" and whole.items() <= r["extra"].items()]
    entropies, all_of_it = (found[-1]["value"], found[-1]["extra"]["looking_and_deciding"]) if found else (None, None)
    yield Bar("entropies, added to reading a prompt", 0.02, entropies, "%", at_most=True)
    yield Bar("all looking and deciding, added to reading a prompt", 0.05, all_of_it, "%", at_most=True)


def _elsewhere() -> Iterator[Bar]:
    """What no cell measures yet."""
    yield Bar("units chosen token by token, 50% of the bytes", 1.3, None)
    yield Bar("the dense model's exact answers, drafted with lookup, SmolLM2", 1.5, None)
