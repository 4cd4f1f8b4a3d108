"""Statistics of a prompt per unit, gathered while it is read."""

from microglia.signals.base import SIGNALS, Prompt, Signal, token_count
from microglia.signals.entropy import Entropy, attention_entropy
from microglia.signals.measure import (
    Measured,
    check_signals,
    feature_size,
    measured,
    signals_at,
    split_features,
    stack_features,
)
from microglia.signals.norm import MeanOutput, Norm, mean_norm
from microglia.signals.queries import Queries

SIGNALS.update(norm=Norm(), entropy=Entropy())

__all__ = [
    "SIGNALS",
    "Entropy",
    "MeanOutput",
    "Measured",
    "Norm",
    "Prompt",
    "Queries",
    "Signal",
    "attention_entropy",
    "check_signals",
    "feature_size",
    "mean_norm",
    "measured",
    "signals_at",
    "split_features",
    "stack_features",
    "token_count",
]
