"""What a pruner knows of units beside their kinds: the order and blocks of channels, and which units always stay."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError, check_range

BLOCK = 64  # channels: runs of so many are read at the memory's speed, scattered ones are not


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How the units of a model are laid out; saved with checkpoints.

    orders: of each layer a permutation (I,) of its channels, best first; None leaves them as the file has them. Blocks
        are cut from this order. Nothing of the model moves: a block is a list of channels.
    block: channels that go or stay together, at most; a divisor of the layer's channels that leaves it eight blocks.
    shared: share of a layer's blocks, its first ones, that every prompt keeps; the rest is decided about.
    protected: layers, counted from either end, whose sublayers are always kept.
    """

    orders: Sequence[Tensor] | None = None
    block: int = BLOCK
    shared: float = 0.0
    protected: tuple[int, ...] = (0, 1, -1)

    def __post_init__(self) -> None:
        check_range("block", self.block, 1, 2**16)
        check_range("shared", self.shared, 0, 1)
        for layer, order in enumerate(self.orders or ()):
            if order.dim() != 1 or not order.sort().values.equal(torch.arange(len(order))):
                raise ConfigError(f"the order of layer {layer} is no permutation of its channels; name each one once")

    @classmethod
    def of_settings(cls, row: Mapping[str, Any], orders: Sequence[Tensor] | None = None) -> "Arrangement":
        """What `settings` gave, from JSON. Raises ConfigError for what it would not give."""
        kinds: dict[str, Any] = {"block": int, "shared": (int, float), "protected": list}
        wrong = [f"{name}={x!r}" for name, x in row.items() if not isinstance(x, kinds.get(name, ()))]
        layers = row.get("protected", [])
        if wrong or not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise ConfigError(
                f"arrangement={dict(row)} was given; it has a block of channels, the share of shared blocks and a list "
                "of protected layers"
            )
        values = {**row, "protected": tuple(layers)} if "protected" in row else dict(row)
        return cls(orders, **values)

    def order(self, layer: int, channels: int) -> Tensor | None:
        """The permutation of a layer. Raises ConfigError where there is none for it, or of another length."""
        if self.orders is None:
            return None
        if layer >= len(self.orders) or len(self.orders[layer]) != channels:
            raise ConfigError(
                f"layer {layer} has {channels} channels, for which the arrangement has no order; order the channels of "
                "this model"
            )
        return self.orders[layer]

    def protects(self, layer: int, layers: int) -> bool:
        """Whether the sublayers of this layer, of so many, are always kept."""
        return layer in self.protected or layer - layers in self.protected

    def settings(self) -> dict[str, Any]:
        """Everything but the orders, ready for JSON; empty where nothing differs from the defaults."""
        row = {"block": self.block, "shared": self.shared, "protected": list(self.protected)}
        usual = {"block": BLOCK, "shared": 0.0, "protected": list(Arrangement.protected)}
        return {name: value for name, value in row.items() if value != usual[name]}

    def fingerprint(self) -> str:
        """Equal for arrangements that are alike, and for no others."""
        digest = hashlib.sha256(repr(self.settings()).encode())
        for order in self.orders or ():
            digest.update(order.numpy().tobytes())
        return digest.hexdigest()[:16]
