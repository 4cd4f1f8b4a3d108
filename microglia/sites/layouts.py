"""The two ways in which attention layers store their projections, and how heads are cut out of them.

A layout is data about a family (attribute names, orientation) plus the geometry it implies. What is the same for all
families (gating, signals, caches) never asks for the layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microglia.geometry import HeadGeometry


@dataclass(frozen=True)
class Cut:
    """Rows (outputs) or columns (inputs) of one projection that stay."""

    projection: str
    index: Tensor
    of_inputs: bool


@dataclass(frozen=True)
class Separate:
    """q, k, v, o as four projections (Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3)."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    transposed: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v, self.o)

    def geometry(self, attention: nn.Module) -> HeadGeometry:
        head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        q, k = (out_features(getattr(attention, name)) for name in (self.q, self.k))
        return HeadGeometry(q // head_dim, k // head_dim, head_dim)

    def cuts(self, geometry: HeadGeometry, heads: Tensor, groups: Tensor) -> list[Cut]:
        """What of each projection belongs to the kept `heads` (k,) and `groups` (g,)."""
        queries, keys = geometry.columns(heads), geometry.columns(groups)
        return [
            Cut(self.q, queries, False),
            Cut(self.k, keys, False),
            Cut(self.v, keys, False),
            Cut(self.o, queries, True),
        ]

    def rewritten(self, kept: HeadGeometry) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Attributes of the attention module, and values of its config, that say the kept geometry."""
        return {"num_key_value_groups": kept.queries_per_group}, {}


@dataclass(frozen=True)
class Fused:
    """One projection for q | k | v (Phi-3; GPT-2, whose Conv1D stores weights as (in, out))."""

    qkv: str = "qkv_proj"
    o: str = "o_proj"
    transposed: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.qkv, self.o)

    def geometry(self, attention: nn.Module) -> HeadGeometry:
        head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        heads = in_features(getattr(attention, self.o)) // head_dim
        both = out_features(getattr(attention, self.qkv)) // head_dim - heads
        return HeadGeometry(heads, both // 2, head_dim)

    def cuts(self, geometry: HeadGeometry, heads: Tensor, groups: Tensor) -> list[Cut]:
        """What of each projection belongs to the kept `heads` (k,) and `groups` (g,)."""
        queries, keys = geometry.columns(heads), geometry.columns(groups)
        rows = torch.cat([queries, geometry.width + keys, geometry.width + geometry.kv_width + keys])
        return [Cut(self.qkv, rows, False), Cut(self.o, queries, True)]

    def rewritten(self, kept: HeadGeometry) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Attributes of the attention module, and values of its config, that say the kept geometry."""
        if self.transposed:  # GPT-2 splits c_attn's output in equal parts of this size
            return {"split_size": kept.width, "num_heads": kept.heads}, {}
        attributes = {"num_key_value_groups": kept.queries_per_group, "num_key_value_heads": kept.kv_heads}
        return attributes, {"num_attention_heads": kept.heads, "num_key_value_heads": kept.kv_heads}


Layout = Separate | Fused


def plain(projection: nn.Module) -> nn.Module:
    """The projection itself, without the LoRA layer that peft may have put around it."""
    return getattr(projection, "base_layer", projection)


def out_features(projection: nn.Module) -> int:
    inner = plain(projection)
    return int(inner.nf if hasattr(inner, "nf") else inner.out_features)  # type: ignore[arg-type]


def in_features(projection: nn.Module) -> int:
    inner = plain(projection)
    return int(inner.nx if hasattr(inner, "nx") else inner.in_features)  # type: ignore[arg-type]
