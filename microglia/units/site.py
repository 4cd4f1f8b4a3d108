"""The units of one kind in one layer: how many there are, how they are gated and cut out, and what they cost."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import Anatomy, Layer
from microglia.errors import MicrogliaError
from microglia.registry import Registry

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
        """As `cut`, with each row's own units, keep (B, U); weights are shared by the rows and stay whole."""

    def filled(self, stack: ExitStack, keep: Tensor, fill: Tensor) -> None:
        """Until `stack` closes, what pruned units leave behind is added. Called before `cut`."""
        raise MicrogliaError(f"a pruned {self.unit} leaves nothing behind; use fill='zero'")

    @abstractmethod
    def saved_bytes(self, keep: Tensor) -> int:
        """Bytes of weights that a step no longer reads once the units outside keep (1, U) are cut out."""

    def kv_share(self, keep: Tensor) -> float:
        """Share of the layer's key/value cache that stays once it is cut to keep (B, U)."""
        return 1.0

    def saved_flops(self, keep: Tensor) -> int:
        """Operations that a row's step no longer makes in its projections once keep (1, U) is cut out."""
        return 0

    def attended_width(self, keep: Tensor | None = None) -> int:
        """Columns over which a step attends (query heads · head size) at keep (B, U); 0 for what does not attend."""
        return 0


UNITS: Registry[type[Site]] = Registry("units")


def find_sites(model: nn.Module, units: Sequence[str] = ("head",)) -> tuple[Site, ...]:
    """All sites of a model, kind by kind and in order of depth.

    Raises ConfigError for an unknown kind, UnsupportedModelError for a model of an unknown family.
    """
    layers = Anatomy(model).layers
    kinds = [UNITS[unit] for unit in units]
    places = [(kind, layer) for kind in kinds for layer in layers]
    return tuple(kind.in_layer(index, layer) for index, (kind, layer) in enumerate(places))
