"""A key/value cache of fixed size and place, of which a level uses the first few groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from microglia.cache import take_rows
from microglia.errors import MicrogliaError
from microglia.geometry import HeadGeometry
from microglia.replay.levels import Placement


@dataclass
class Place:
    """Where all layers of a cache are: `position` (1,) of the next token as data, `seen` tokens as Python knows them.

    stepping: whether a decode step is being made, which must not depend on what Python knows.
    """

    position: Tensor
    seen: int = 0
    stepping: bool = False


@dataclass(frozen=True)
class Rows:
    """Each row's own groups (B, g), query heads (B, k) and which of these it asked for (B, k): views of buffers."""

    groups: Tensor
    heads: Tensor
    asked: Tensor


class StaticKV(CacheLayerMixin):
    """Keys and values (B, G, room, D) of one site. The prompt fills all groups; a level continues the first `groups`.

    Sliding layers keep everything too: their window is a matter of the mask, which is data.
    """

    is_compileable = True
    is_sliding = False

    def __init__(
        self, geometry: HeadGeometry, batch: int, room: int, place: Place, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        shape = (batch, geometry.kv_heads, room, geometry.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.place, self.is_initialized = place, True
        self.now = self.level(geometry.kv_heads)
        self.stock: Any = None  # the attention function that the site calls by itself
        self.products = False  # whether attention is two products instead
        self.rows: Rows | None = None
        self.gate: Tensor | None = None  # (B, H)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prompt's (B, G, T, D) → the same, kept from place 0. A step's (B, G or g, 1, D) → (B, g, room, D)."""
        assert self.keys is not None
        assert self.values is not None
        if not self.place.stepping:
            length = key_states.shape[2]
            self.keys[:, :, :length].copy_(key_states)
            self.values[:, :, :length].copy_(value_states)
            return key_states, value_states
        if self.rows is not None:
            key_states, value_states = (take_rows(x, self.rows.groups) for x in (key_states, value_states))
        keys, values = self.now
        keys.index_copy_(2, self.place.position, key_states)
        values.index_copy_(2, self.place.position, value_states)
        return keys, values

    def level(self, groups: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `groups` (B, g, room, D), as views that a step writes and reads.

        Made once and not in the step: a compiler that saw the cut would write to a copy, and copy it back, every time.
        """
        assert self.keys is not None
        assert self.values is not None
        with torch.inference_mode(False):
            return self.keys[:, :groups], self.values[:, :groups]

    def move(self, placement: Placement) -> None:
        """Bring the groups that a decision keeps to the front, each row its own."""
        source, target = placement.source.flatten(), placement.target.flatten()
        if len(source) == 0:  # every group has its place
            return
        for tensor in (self.keys, self.values):
            assert tensor is not None
            whole = widest(tensor.view(tensor.shape[0] * tensor.shape[1], -1))  # (B·G, room·D) in 16-byte words
            whole.index_copy_(0, target, whole.index_select(0, source))

    def get_seq_length(self) -> Any:
        """Tokens so far; within a step as a tensor (1,), as the library's own static layers have it."""
        return self.place.position[0] if self.place.stepping else self.place.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that attention will see, and the offset of the first. The prompt sees itself only."""
        assert self.keys is not None
        return (self.keys.shape[2] if self.place.stepping else query_length), 0

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # as transformers before 5.16 calls it

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: rows of a captured cache have their places."""
        raise MicrogliaError("beams move the rows of the cache, which is captured; use path='compact' for beam search")


def widest(x: Tensor) -> Tensor:
    """The same bits (..., N) as 16-byte words, if N allows: copying heads then moves words and not single values."""
    words = 16 // x.element_size()
    return x.view(torch.complex128) if x.shape[-1] % words == 0 and x.storage_offset() % words == 0 else x


class StaticHeads(Cache):
    """The cache of a model whose steps are captured: one StaticKV per site, all at one place."""

    def __init__(
        self,
        geometries: Sequence[HeadGeometry],
        batch: int,
        room: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.place = Place(torch.zeros(1, dtype=torch.long, device=device))
        layers: list[Any] = [StaticKV(g, batch, room, self.place, dtype=dtype, device=device) for g in geometries]
        super().__init__(layers=layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: Any, *_: Any, **__: Any) -> Any:
        """As in the library; in a step a layer gives its StaticKV instead of its number: so all layers are alike."""
        layer = layer_idx if isinstance(layer_idx, StaticKV) else self.layers[layer_idx]
        return layer.update(key_states, value_states)

    @property
    def is_compileable(self) -> bool:
        """True in a step only: the mask must then be made from data. Outside, nobody should compile by himself."""
        return self.place.stepping
