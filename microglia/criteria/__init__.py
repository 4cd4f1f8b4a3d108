"""Criteria from the literature behind one interface; each enters itself into CRITERIA.

    policy = get_criterion("taylor").policy(Calibration(model, tokenizer, task, examples))

The policy goes through the same gate, budget, buckets and compaction as the agents, so comparisons are fair.
"""

from dataclasses import fields
from typing import Any

from microglia.criteria import (  # noqa: F401  # each registers itself
    activation_variance,
    agents,
    block_influence,
    cascade,
    conflict,
    entropy,
    expert,
    fluctuation,
    griffin,
    hessian,
    lora_gradient,
    movement,
    norm,
    predictor,
    random,
    shapley,
    static_baseline,
    taylor,
    upper_layers,
    variational,
    wanda,
    weight,
)
from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.criteria.order import ordered_channels
from microglia.errors import ConfigError

__all__ = ["CRITERIA", "Calibration", "Criterion", "get_criterion", "ordered_channels"]


def get_criterion(name: str, **options: Any) -> Criterion:
    """The criterion called `name` with its own options. Raises ConfigError for an unknown name or option."""
    kind = CRITERIA[name]
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in known]:
        allowed = f"its options are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"criterion {name} has no option {unknown[0]!r}; {allowed}")
    return kind(**options)
