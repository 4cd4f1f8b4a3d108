"""Statistics of a prompt per unit, gathered while it is read."""

from microglia.signals.base import SIGNALS, Prompt, Signal, token_count
from microglia.signals.channels import Activation, Contribution
from microglia.signals.conflict import Conflict
from microglia.signals.entropy import Entropy, attention_entropy
from microglia.signals.measure import (
    Measured,
    check_signals,
    feature_size,
    measured,
    signals_at,
    split_features,
    stack_features,
    usual_signals,
)
from microglia.signals.norm import MEANS, MeanOutput, Norm, mean_norm
from microglia.signals.queries import Queries
from microglia.signals.sublayers import Cosine

SIGNALS.update(
    norm=Norm(),
    entropy=Entropy(),
    conflict=Conflict(),
    activation=Activation(),
    contribution=Contribution(),
    cosine=Cosine(),
)

__all__ = [
    "MEANS",
    "SIGNALS",
    "Activation",
    "Conflict",
    "Contribution",
    "Cosine",
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
    "usual_signals",
]
