"""Per-head statistics of a prompt: pure functions of tensors."""

from microglia.signals.entropy import Queries, attention_entropy
from microglia.signals.features import SIGNALS, feature_size, split_features, stack_features
from microglia.signals.norm import mean_norm, token_count

__all__ = [
    "SIGNALS",
    "Queries",
    "attention_entropy",
    "feature_size",
    "mean_norm",
    "split_features",
    "stack_features",
    "token_count",
]
