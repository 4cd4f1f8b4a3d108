"""The units of one kind in one layer: how many there are, how they are gated and cut out, and what they cost."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import Anatomy, Layer, swap
from microglia.anatomy.projection import Cut, cut_bytes, features, plain, sliced
from microglia.errors import MicrogliaError
from microglia.registry import Registry
from microglia.units.arrangement import Arrangement
from microglia.units.costs import UnitCosts

MOST_UNITS = 2**16  # of a site, and of whatever else its geometry counts: more is no model but a mistake or an attack


class Geometry(Protocol):
    """How many units there are, and which of them can go together. A frozen, hashable value; saved with checkpoints."""

    @property
    def unit(self) -> str:
        """The kind of the units: its name in UNITS."""

    @property
    def count(self) -> int:
        """Units U that can be kept or pruned."""

    @property
    def protected(self) -> int:
        """The first so many of them are always kept, whatever their scores."""

    @property
    def default_bucket(self) -> int:
        """What counts are rounded up to unless something else is asked for."""

    def rectangle(self, scores: Tensor, bucket: int | None = None) -> Tensor:
        """Scores (B, U), above 0 = requested → keep (B, U), boolean, of a shape that can be cut out."""


@dataclass(frozen=True, eq=False)
class Site(ABC):
    """The units of one kind in one layer. To add a kind: a subclass, registered in UNITS.

    index: counts the sites that are decided about from 0. geometry_type: the class of its geometry, a dataclass of
    integers.
    """

    geometry_type: ClassVar[type]

    index: int
    layer: Layer
    geometry: Geometry

    @classmethod
    @abstractmethod
    def in_layer(cls, index: int, layer: Layer) -> "Site":
        """The units of this kind in a layer."""

    def arranged(self, arrangement: Arrangement, layers: int) -> "Site":
        """The same units as an arrangement has them, in a model of so many layers."""
        return self

    @property
    def unit(self) -> str:
        """The kind's name in UNITS."""
        return self.geometry.unit

    @property
    def output(self) -> nn.Module:
        """The module whose output the units' decision changes; a pass that does not call it passes the decision by."""
        module = self.layer.module.get_submodule(self.name.removeprefix(f"{self.layer.name}."))
        return module

    @property
    @abstractmethod
    def name(self) -> str:
        """The dotted path of the module that holds the units."""

    @abstractmethod
    def gated(
        self, keep: Tensor, *, where: Tensor | None = None, fill: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """While inside, the units' outputs are multiplied by keep (B, U) or (1, U): nothing is saved.

        where: (B, T) limits it to these positions. fill: what stands in for a pruned unit, zero when None.
        """

    @abstractmethod
    def cut(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        """Until `stack` closes, only the units that keep (U,) holds exist; the prompt's cache loses what they held."""

    @abstractmethod
    def cut_rows(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        """As `cut`, with each row's own units, keep (B, U); weights are shared by the rows."""

    def filled(self, stack: ExitStack, keep: Tensor, fill: Tensor) -> None:
        """Until `stack` closes, what pruned units leave behind is added. Called before `cut`."""
        raise MicrogliaError(f"a pruned {self.unit} leaves nothing behind; use fill='zero'")

    # --- cost ---------------------------------------------------------------------------------------------------------

    def read_by(self, keep: Tensor) -> Tensor:
        """The units (1, U) whose weights a batch with decisions keep (B, U) reads."""
        return keep[:1] if bool((keep == keep[:1]).all()) else torch.ones_like(keep[:1])

    @abstractmethod
    def saved_bytes(self, keep: Tensor) -> int:
        """Bytes of weights that a step no longer reads once the units outside keep (1, U) are cut out."""

    def kv_share(self, keep: Tensor) -> float:
        """Share of the layer's key/value cache that stays once it is cut to keep (B, U)."""
        return 1.0

    def costs(self, kv: float) -> UnitCosts:
        """Bytes of every unit, in a layer with so many bytes of keys and values."""
        alone = ~torch.eye(self.geometry.count, dtype=torch.bool)
        saved = [self.saved_bytes(one[None]) + kv * (1 - self.kv_share(one[None])) for one in alone]
        return UnitCosts.of_units(torch.tensor(saved, dtype=torch.float64))

    def saved_flops(self, keep: Tensor) -> int:
        """Operations that a row's step no longer makes in its projections once keep (1, U) is cut out."""
        return 0

    def attended_width(self, keep: Tensor | None = None) -> int:
        """Columns over which a step attends (query heads · head size) at keep (B, U); 0 for what does not attend."""
        return 0


class ProjectedSite(Site):
    """Units whose outputs stand side by side in the input of one projection, `output`: heads, blocks of channels."""

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """The projection's input, or anything of its width, by unit: (..., U·D) → (..., U, D)."""

    @property
    @abstractmethod
    def projections(self) -> tuple[str, ...]:
        """Names of the projections that hold the units, as attributes of `holder`; the last is `output`."""

    @property
    @abstractmethod
    def holder(self) -> nn.Module:
        """The module that holds the projections: attention or MLP."""

    @abstractmethod
    def gate(self, keep: Tensor, where: Tensor | None, fill: Tensor | None) -> Callable[..., Any]:
        """The hook before `output` that multiplies its input by keep, see `gated`."""

    @contextmanager
    def gated(self, keep: Tensor, *, where: Tensor | None = None, fill: Tensor | None = None) -> Iterator[None]:
        """keep (B, U) or (1, U). fill (B, U, D) stands in for what a pruned unit would have given."""
        handle = self.output.register_forward_pre_hook(self.gate(keep, where, fill))
        try:
            yield
        finally:
            handle.remove()

    def cut_out(self, stack: ExitStack, cuts: Iterable[Cut], run: int) -> None:
        """Until `stack` closes, only what `cuts` name is left of the projections; copied in runs of so many."""
        for one in cuts:
            smaller = sliced(getattr(self.holder, one.projection), one, f"{self.name}.{one.projection}", run)
            swap(stack, self.holder, one.projection, smaller)

    @abstractmethod
    def cut_sizes(self, keep: Tensor) -> Iterator[tuple[nn.Module, int, bool]]:
        """Of every projection at keep (1, U): itself, its kept rows or columns, and whether these are inputs."""

    @property
    def output(self) -> nn.Module:
        """The projection whose input is the one place where the units are told apart and gated."""
        return self.holder.get_submodule(self.projections[-1])

    def saved_bytes(self, keep: Tensor) -> int:
        return sum(cut_bytes(module, kept, of_inputs=inputs) for module, kept, inputs in self.cut_sizes(keep))

    def saved_flops(self, keep: Tensor) -> int:
        total = 0
        for module, kept, of_inputs in self.cut_sizes(keep):
            weight: Any = plain(module).weight
            whole = features(module, of_inputs=of_inputs)
            total += 2 * int(weight.numel()) * (whole - kept) // whole
        return total

    def fill_bias(self, keep: Tensor, fill: Tensor) -> Tensor:
        """What the pruned units' `fill` (B, U, D) adds after the dense output projection, (B, 1, hidden).

        `keep` (B, U) or (1, U).
        """
        with torch.no_grad():
            left = self.joined(fill * (1 - keep)[..., None].to(fill.dtype))[:, None]  # (B, 1, U·D)
            bias: Tensor = self.output(left) - self.output(torch.zeros_like(left))  # without the projection's own bias
            return bias

    def joined(self, parts: Tensor) -> Tensor:
        """The other way round as `split`: (..., U, D) → (..., U·D)."""
        return parts.flatten(-2)


def limited(factor: Tensor, where: Tensor | None) -> Tensor:
    """A factor (B, 1, …) for every position, 1 outside `where` (B, T)."""
    if where is None:
        return factor
    return torch.where(where.reshape(*where.shape, *[1] * (factor.dim() - 2)), factor, torch.ones_like(factor))


def check_rows(site: Site, rows: int, decisions: int) -> None:
    """Raise MicrogliaError where a pass has other rows than the decisions that it is to be made with."""
    if decisions not in (1, rows):
        raise MicrogliaError(
            f"{site.name} got a batch of {rows} rows but decisions for {decisions}; continue the batch that was read, "
            "or read the new prompts first"
        )


UNITS: Registry[type[Site]] = Registry("units")


def find_sites(
    model: nn.Module, units: Sequence[str] = ("head",), arrangement: Arrangement | None = None
) -> tuple[Site, ...]:
    """All sites of a model, kind by kind and in order of depth.

    Raises ConfigError for an unknown kind or an arrangement of another model, UnsupportedModelError for a model of an
    unknown family.
    """
    layers = Anatomy(model).layers
    kinds = [UNITS[unit] for unit in units]
    places = [(kind, layer) for kind in kinds for layer in layers]
    how = arrangement or Arrangement()
    return tuple(kind.in_layer(i, layer).arranged(how, len(layers)) for i, (kind, layer) in enumerate(places))
