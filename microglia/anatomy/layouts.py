"""The ways in which attention layers and MLPs store their projections, and what of them belongs to some heads.

A layout is data about a family: names of attributes and what they hold. What is the same for all families (gating,
signals, caches) never looks at the layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microglia.anatomy.geometry import HeadGeometry
from microglia.anatomy.projection import Cut, features


@dataclass(frozen=True)
class Separate:
    """q, k, v, o as four projections (Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3)."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, as attributes of the attention module."""
        return (self.q, self.k, self.v, self.o)

    def geometry(self, attention: nn.Module) -> HeadGeometry:
        """The head geometry that the sizes of the projections imply."""
        size = _head_dim(attention)
        q, k = (features(getattr(attention, name), of_inputs=False) for name in (self.q, self.k))
        return HeadGeometry(q // size, k // size, size)

    def cuts(self, geometry: HeadGeometry, heads: Tensor, groups: Tensor) -> list[Cut]:
        """What of each projection belongs to the kept `heads` (k,) and `groups` (g,)."""
        queries, keys = geometry.columns(heads), geometry.columns(groups)
        rows = [Cut(name, index, False) for name, index in ((self.q, queries), (self.k, keys), (self.v, keys))]
        return [*rows, Cut(self.o, queries, True)]

    def rewritten(self, kept: HeadGeometry) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Attributes of the attention module, and values of its config, that say the kept geometry."""
        return {"num_key_value_groups": kept.queries_per_group}, {}


@dataclass(frozen=True)
class Fused:
    """One projection for q | k | v, and a forward pass that reads head counts from the config (Phi-3)."""

    qkv: str = "qkv_proj"
    o: str = "o_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, as attributes of the attention module."""
        return (self.qkv, self.o)

    def geometry(self, attention: nn.Module) -> HeadGeometry:
        """The head geometry that the sizes of the projections imply."""
        size = _head_dim(attention)
        heads = features(getattr(attention, self.o), of_inputs=True) // size
        both = features(getattr(attention, self.qkv), of_inputs=False) // size - heads
        return HeadGeometry(heads, both // 2, size)

    def cuts(self, geometry: HeadGeometry, heads: Tensor, groups: Tensor) -> list[Cut]:
        """What of each projection belongs to the kept `heads` (k,) and `groups` (g,)."""
        queries, keys = geometry.columns(heads), geometry.columns(groups)
        rows = torch.cat([queries, geometry.width + keys, geometry.width + geometry.kv_width + keys])
        return [Cut(self.qkv, rows, False), Cut(self.o, queries, True)]

    def rewritten(self, kept: HeadGeometry) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Attributes of the attention module, and values of its config, that say the kept geometry."""
        attributes = {"num_key_value_groups": kept.queries_per_group, "num_key_value_heads": kept.kv_heads}
        return attributes, {"num_attention_heads": kept.heads, "num_key_value_heads": kept.kv_heads}


@dataclass(frozen=True)
class FusedEqual(Fused):
    """As Fused, split into three equal parts of `split_size` (GPT-2)."""

    qkv: str = "c_attn"
    o: str = "c_proj"

    def rewritten(self, kept: HeadGeometry) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Attributes of the attention module, and values of its config, that say the kept geometry."""
        return {"split_size": kept.width, "num_heads": kept.heads}, {}


AttentionLayout = Separate | Fused


@dataclass(frozen=True)
class Mlp:
    """An MLP: `up` projections whose outputs are its channels, `down` which reads them.

    packed: the first `up` holds gate | up in one (Phi-3). One `up` that is not packed has no gate (GPT-2).
    """

    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    packed: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, as attributes of the MLP."""
        return (*self.up, self.down)

    def cuts(self, channels: int, index: Tensor) -> list[Cut]:
        """What of each projection belongs to the kept channels `index` (k,), of so many channels in all."""
        rows = torch.cat([index, channels + index]) if self.packed else index
        return [*(Cut(name, rows, False) for name in self.up), Cut(self.down, index, True)]


def _head_dim(attention: nn.Module) -> int:
    size = attention.head_dim
    assert isinstance(size, int)
    return size
