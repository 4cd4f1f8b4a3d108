"""Measure a prompt while the model reads it: the signals of every site, from one dense forward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.signals.base import SIGNALS, Prompt, Signal
from microglia.signals.norm import MEANS
from microglia.units import Geometry, Site


def check_signals(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of signals, in their order; as a text, with commas or + between them (`both`, of 0.1: norm and entropy).

    Raises ConfigError for an unknown one, or one that is named twice.
    """
    if isinstance(names, str):
        text = "norm,entropy" if names == "both" else names
        names = [name.strip() for name in text.replace("+", ",").split(",")]
    for name in names:
        _ = SIGNALS[name]
    if len(set(names)) < len(names):
        raise ConfigError(f"signals={','.join(names)!r} names a signal twice; name each one once")
    return tuple(names)


def usual_signals(units: Sequence[str]) -> tuple[str, ...]:
    """What policies see of a prompt that decide about these kinds of units, unless something else is asked for."""
    return tuple(name for name, signal in SIGNALS.items() if signal.usual and signal.unit in units)


def signals_at(unit: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the signals that are measured at this kind of unit."""
    return tuple(name for name in check_signals(names) if SIGNALS[name].unit == unit)


def feature_size(geometry: Geometry, signals: Sequence[str]) -> int:
    """Length of the feature vector of a site with this geometry."""
    return geometry.count * len(signals_at(geometry.unit, signals))


def stack_features(values: Mapping[str, Tensor], signals: Sequence[str]) -> Tensor:
    """Signals by name, (B, U) each → features (B, F), side by side in the order of `signals`."""
    return torch.cat([values[name] for name in signals], dim=-1)


def split_features(features: Tensor, signals: Sequence[str]) -> dict[str, Tensor]:
    """Features (B, F) → their signals by name, (B, U) each: what `stack_features` made them of."""
    if features.shape[-1] == 0:
        return {}
    return dict(zip(signals, features.chunk(len(signals), dim=-1), strict=True))


@dataclass
class Measured:
    """Values (B, U) by signal and site index. complete: whether the pass came to its end, so that all are there."""

    prompt: Prompt
    values: dict[str, dict[int, Any]] = field(default_factory=dict)
    complete: bool = False

    def at(self, site: Site, signals: Sequence[str]) -> dict[str, Tensor]:
        """The site's values (B, U) of those signals that are measured at it, by name."""
        return {name: self.values[name][site.index] for name in signals_at(site.unit, signals)}

    def features(self, site: Site, signals: Sequence[str]) -> Tensor:
        """The same side by side, (B, F); (B, 0) where no signal is measured."""
        values = self.at(site, signals)
        return (
            stack_features(values, tuple(values))
            if values
            else self.prompt.weight.new_zeros(len(self.prompt.weight), 0)
        )

    def every_features(self, sites: Sequence[Site], signals: Sequence[str]) -> list[Tensor]:
        """`features` of all sites; of those of one shape together, as each by itself would be a kernel more."""
        found: dict[int, Tensor] = {}
        alike: dict[Any, list[int]] = {}
        values = [self.at(site, signals) for site in sites]
        for place, named in enumerate(values):
            kind = [(name, x.shape, x.dtype, x.device) for name, x in named.items()]
            alike.setdefault(tuple(kind), []).append(place)
        for places in alike.values():
            names = tuple(values[places[0]])
            if len(places) > 1 and names:
                stacked = {name: torch.stack([values[place][name] for place in places]) for name in names}
                found |= dict(zip(places, stack_features(stacked, names).unbind(), strict=True))  # (L, B, F)
            else:
                found |= {place: self.features(sites[place], signals) for place in places}
        return [found[place] for place in range(len(sites))]

    def means(self, sites: Sequence[Site]) -> list[Tensor | None] | None:
        """What the pruned units of every site leave behind; None where no mean was measured."""
        found = {index: value for mean in MEANS for index, value in self.values.get(mean.name, {}).items()}
        return [found.get(site.index) for site in sites] if found else None


@contextmanager
def measured(sites: Sequence[Site], signals: Sequence[Signal], prompt: Prompt) -> Iterator[Measured]:
    """Gather signals from the one forward pass made inside; they are finished when it is left."""
    result = Measured(prompt)
    with ExitStack() as stack:
        for signal in signals:
            places = result.values[signal.name] = {}
            for site in sites:
                if site.unit == signal.unit:
                    stack.enter_context(signal.measure(site, prompt, partial(places.__setitem__, site.index)))
        yield result
    expected = [sum(site.unit == signal.unit for site in sites) for signal in signals]
    result.complete = [len(result.values[signal.name]) for signal in signals] == expected
    for signal in signals if result.complete else ():
        places = result.values[signal.name]
        result.values[signal.name] = dict(zip(places, signal.finish(list(places.values())), strict=True))
