"""The head geometry of one attention site: a frozen value, made once. Nobody else divides by a number of heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.errors import ConfigError


@dataclass(frozen=True)
class HeadGeometry:
    """`heads` query heads of size `head_dim` in `kv_heads` groups (one key/value head each) of equal size.

    Shapes in this project: B batch rows, T tokens, H query heads, G groups, D head size.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} heads in {self.kv_heads} groups of head size {self.head_dim} make no geometry; all "
                "three must be at least 1 and the heads a multiple of the groups"
            )

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head (1 in multi-head attention)."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of the output projection's input: H · D."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys (and of the values) of one token: G · D."""
        return self.kv_heads * self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """`(..., H·D)` → `(..., H, D)`."""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def by_group(self, x: Tensor) -> Tensor:
        """`(..., H)` → `(..., G, H/G)`."""
        return x.unflatten(-1, (self.kv_heads, self.queries_per_group))

    def group_of(self, heads: Tensor) -> Tensor:
        """Group index of each head index, same shape."""
        return heads // self.queries_per_group

    def columns(self, heads: Tensor) -> Tensor:
        """`(k,)` head (or group) indices → `(k·D,)` indices of their rows in a projection."""
        if self.head_dim == 1:
            return heads
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()

    def kept(self, heads: int, kv_heads: int) -> "HeadGeometry":
        """The geometry that is left when `heads` query heads in `kv_heads` groups are kept."""
        return HeadGeometry(heads, kv_heads, self.head_dim)
