"""A key/value cache of fixed size and place, of which a bucket uses the first few groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from microglia.anatomy import HeadGeometry, RowShape
from microglia.errors import MicrogliaError
from microglia.execution.captured.buckets import SlotMap
from microglia.execution.captured.moves import Copy, copies_of_blocks
from microglia.units.kv import take_rows


@dataclass
class Place:
    """Where all layers of a cache are: `position` (1,) of the next token as data, `length` tokens as Python knows them.

    stepping: whether a decode step is being made, which must not depend on what Python knows.
    """

    position: Tensor
    length: int = 0
    stepping: bool = False


class StaticKV(CacheLayerMixin):
    """Keys and values (B, G, T, D) of one site. The prompt fills all groups; a bucket continues the first `groups`.

    They are stored as (G, B, T, D): what a bucket uses is one contiguous piece from the start, which matrix products
    read as it is. With rows outermost they would first copy it, every key and value in every step.
    Sliding layers keep everything too: their window is a matter of the mask, which is data.
    """

    is_compileable = True
    is_sliding = False

    def __init__(
        self, geometry: HeadGeometry, batch: int, length: int, place: Place, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        shape = (geometry.kv_heads, batch, length, geometry.head_dim)
        self.stored = (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        self.keys, self.values = (x.transpose(0, 1) for x in self.stored)
        self.place, self.is_initialized = place, True
        self.active = self.first(geometry.kv_heads)
        self.rows: RowShape | None = None  # each row's own heads, where rows decide for themselves

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prompt's (B, G, T, D) → the same, kept from place 0. A step's (B, G or g, 1, D) → (B, g, T, D)."""
        assert self.keys is not None
        assert self.values is not None
        if not self.place.stepping:
            length = key_states.shape[2]
            self.keys[:, :, :length].copy_(key_states)
            self.values[:, :, :length].copy_(value_states)
            return key_states, value_states
        if self.rows is not None:
            key_states, value_states = (take_rows(x, self.rows.groups) for x in (key_states, value_states))
        keys, values = self.active
        keys.index_copy_(2, self.place.position, key_states.transpose(0, 1))
        values.index_copy_(2, self.place.position, value_states.transpose(0, 1))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def first(self, groups: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `groups` as stored, (g, B, room, D): what a step writes and reads.

        Made once and not in the step: a compiler that saw the cut would write to a copy, and copy it back, every time.
        """
        with torch.inference_mode(False):
            keys, values = (x[:groups] for x in self.stored)
        return keys, values

    def move(self, slots: SlotMap) -> None:
        """Bring the groups that a decision keeps to the front, each row its own."""
        source, target = slots.source.flatten(), slots.target.flatten()
        if len(source) == 0:  # every group has its slot
            return
        for tensor in self.stored:
            whole = widest(tensor.view(tensor.shape[0] * tensor.shape[1], -1))  # (G·B, room·D) in 16-byte words
            whole.index_copy_(0, target, whole.index_select(0, source))

    def copies(self, where: SlotMap) -> list[Copy]:
        """What `move` copies, as data: `where` in all slots those of this site stand."""
        moves = list(zip(where.source.flatten().tolist(), where.target.flatten().tolist(), strict=True))
        return [copy for x in self.stored for copy in copies_of_blocks(x.flatten(0, 1), moves)]

    def get_seq_length(self) -> Any:
        """Tokens so far; within a step as a tensor (1,), as the library's own static layers have it."""
        return self.place.position[0] if self.place.stepping else self.place.length

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
        raise MicrogliaError(
            "beams move the rows of the cache, which is captured; use execution='compact' for beam search"
        )


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
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.place = Place(torch.zeros(1, dtype=torch.long, device=device))
        layers: list[Any] = [StaticKV(g, batch, length, self.place, dtype=dtype, device=device) for g in geometries]
        super().__init__(layers=layers)

    @property
    def is_compileable(self) -> bool:
        """True in a step only: the mask must then be made from data. Outside, nobody should compile by himself."""
        return self.place.stepping


class LayerCache:
    """A step's cache as one layer sees it, whatever number the layer gives.

    Every layer then is the same code to a compiler, which would take another number for another layer.
    """

    def __init__(self, kv: StaticKV) -> None:
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See `StaticKV.update`."""
        return self.kv.update(key_states, value_states)
