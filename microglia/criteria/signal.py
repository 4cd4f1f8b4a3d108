"""A prompt's own signal as its logits: what norm and entropy share."""

from torch import Tensor

from microglia.criteria.base import relative
from microglia.errors import ConfigError
from microglia.policy import Policy


class SignalPolicy(Policy):
    """`norm`: each head's norm relative to its site's mean. `entropy`: one minus it, so that focused heads stay.

    No parameter; every prompt decides from what was seen of it alone.
    """

    def __init__(self, features: str) -> None:
        super().__init__()
        if features not in ("norm", "entropy"):
            raise ConfigError(f"features={features!r} is not one signal; choose norm or entropy")
        self.features = features

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        return relative(features) if self.features == "norm" else 1 - features
