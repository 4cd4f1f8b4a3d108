"""Signals become features: which ones an agent sees, side by side."""

from collections.abc import Mapping

import torch
from torch import Tensor

from microglia.errors import ConfigError

SIGNALS = ("norm", "entropy")


def selected(features: str) -> tuple[str, ...]:
    """`both`, `norm` or `entropy` → the names of the signals. Raises ConfigError for anything else."""
    if features == "both":
        return SIGNALS
    if features in SIGNALS:
        return (features,)
    raise ConfigError(f"features={features!r} is unknown; choose both, norm or entropy")


def feature_size(heads: int, features: str) -> int:
    """Length of the feature vector of a site with so many heads."""
    return heads * len(selected(features))


def split_features(features: Tensor, selected_as: str = "both") -> dict[str, Tensor]:
    """Features (B, F) → their signals by name, (B, H) each: what `stack_features` made them of."""
    names = selected(selected_as)
    return dict(zip(names, features.chunk(len(names), dim=-1), strict=True))


def stack_features(signals: Mapping[str, Tensor], features: str = "both") -> Tensor:
    """Signals by name, (B, H) each → features (B, 2·H), or (B, H) when one signal is selected."""
    return torch.cat([signals[name] for name in selected(features)], dim=-1)
