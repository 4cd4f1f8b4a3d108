"""The attention and the MLP of a layer as units: each is the case in which none of its heads, or channels, is kept.

A sublayer that is gone costs no projection, no norm, no keys and values. The first two layers carry a model and the
last one speaks for it, so their sublayers are protected unless the arrangement says otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import Layer, swap
from microglia.anatomy.projection import linear_flops, tensor_bytes
from microglia.errors import ConfigError
from microglia.units.arrangement import Arrangement
from microglia.units.kv import drop_kv
from microglia.units.site import Geometry, Site, check_rows, limited

HALVES = ("head", "channel")  # the kinds of units that live in a layer's attention, unit 0, and in its MLP, unit 1


@dataclass(frozen=True)
class SublayerGeometry:
    """Two units, attention and MLP; the first `protected` of them are always kept. Each goes by itself."""

    unit: ClassVar[str] = "sublayer"
    count: ClassVar[int] = 2
    default_bucket: ClassVar[int] = 1

    protected: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.protected <= self.count:
            raise ConfigError(f"protected={self.protected} was given; a layer has 0 to {self.count} sublayers")

    def rectangle(self, scores: Tensor, bucket: int | None = None) -> Tensor:
        """Scores (B, 2), above 0 = requested → keep (B, 2), boolean; there is nothing to round."""
        return (scores > 0) | (torch.arange(self.count, device=scores.device) < self.protected)


@dataclass(frozen=True, eq=False)
class SublayerSite(Site):
    """The two sublayers of one layer."""

    geometry_type: ClassVar[type] = SublayerGeometry

    geometry: SublayerGeometry

    @classmethod
    def in_layer(cls, index: int, layer: Layer) -> "SublayerSite":
        return cls(index, layer, SublayerGeometry())

    def arranged(self, arrangement: Arrangement, layers: int) -> "SublayerSite":
        kept = arrangement.protects(self.layer.index, layers)
        return replace(self, geometry=SublayerGeometry(SublayerGeometry.count if kept else 0))

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def output(self) -> nn.Module:
        return self.layer.module

    @contextmanager
    def gated(self, keep: Tensor, *, where: Tensor | None = None, fill: Tensor | None = None) -> Iterator[None]:
        """keep (B, 2) or (1, 2): what attention and MLP add to the residual stream is multiplied by it."""

        def gate(half: int, _: nn.Module, inputs: Any, output: Any) -> Any:
            written = output[0] if isinstance(output, tuple) else output  # (B, T, hidden)
            check_rows(self, len(written), len(keep))
            factor = limited(keep[:, None, half, None].to(written), where)
            return (written * factor, *output[1:]) if isinstance(output, tuple) else written * factor

        with ExitStack() as stack:
            for half, module in enumerate(self.layer.contributions):
                stack.callback(module.register_forward_hook(partial(gate, half)).remove)
            yield

    def cut(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        for half, module in enumerate(self.layer.halves):
            if bool(keep[half]):
                continue
            for norm in self.layer.norms_around(half):
                swap(stack, norm, "forward", _unchanged)
            swap(stack, module, "forward", _nothing if half else partial(_no_attention, self.layer))
        if not bool(keep[0]) and cache is not None:
            drop_kv(stack, cache, self.layer.index)

    def cut_rows(self, stack: ExitStack, keep: Tensor, cache: Cache | None) -> None:
        """What no row keeps is gone; the rest is computed for all rows, and gated."""
        together = keep.any(0)
        self.cut(stack, together, cache)
        if not bool((keep == together).all()):
            stack.enter_context(self.gated(keep | ~together))

    # --- cost ---------------------------------------------------------------------------------------------------------

    def read_by(self, keep: Tensor) -> Tensor:
        return keep.amax(0, keepdim=True)

    def saved_bytes(self, keep: Tensor) -> int:
        return sum(self._bytes(half) for half in range(2) if not bool(keep[0, half]))

    def _bytes(self, half: int) -> int:
        modules = [self.layer.halves[half], *self.layer.norms_around(half)]
        return sum(tensor_bytes(p) for module in modules for p in module.parameters())

    def kv_share(self, keep: Tensor) -> float:
        return float(bool(keep[:, 0].any()))

    def saved_flops(self, keep: Tensor) -> int:
        return sum(linear_flops(module) for half, module in enumerate(self.layer.halves) if not bool(keep[0, half]))

    def attended_width(self, keep: Tensor | None = None) -> int:
        return self.layer.heads.width if keep is None or bool(keep[:, 0].any()) else 0


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _nothing(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden)


def _no_attention(layer: Layer, hidden_states: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """No attention, whose cache counts the tokens all the same: some masks are made by this layer's length."""
    cache, batch, length = options.get("past_key_values"), *hidden_states.shape[:2]
    if cache is not None:
        none = hidden_states.new_empty(batch, 0, length, layer.heads.head_dim)
        cache.update(none, none, layer.index)
    return torch.zeros_like(hidden_states), None


def nested(keep: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
    """Keeps (B, U) of all sites, in which the heads and channels of a sublayer that is gone are gone with it.

    Sites of each kind come in order of depth, one a layer.
    """
    places: dict[str, list[int]] = {}
    for index, geometry in enumerate(geometries):
        places.setdefault(geometry.unit, []).append(index)
    within = list(keep)
    for half, unit in enumerate(HALVES):
        for index, sublayer in zip(places.get(unit, ()), places.get("sublayer", ()), strict=False):
            within[index] = keep[index] * keep[sublayer][:, half : half + 1]
    return within


def gone(site: Site, keep: Tensor) -> bool:
    """Whether a site with these decisions (B, U) went with its sublayer: by themselves, heads and channels keep one."""
    return site.unit in HALVES and not bool((keep > 0).any())
