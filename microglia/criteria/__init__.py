"""Criteria from the literature behind one interface; the registry below is all there is to know about which exist.

    policy = get_criterion("taylor").policy(Calibration(model, tokenizer, task, examples))

The policy goes through the same gate, budget, buckets and compaction as the agents, so comparisons are fair.
"""

from dataclasses import fields
from typing import Any

from microglia.criteria.activation_variance import ActivationVariance
from microglia.criteria.base import Criterion
from microglia.criteria.calibration import Calibration
from microglia.criteria.cascade import Cascade
from microglia.criteria.entropy import Entropy
from microglia.criteria.expert import Expert
from microglia.criteria.fluctuation import Fluctuation
from microglia.criteria.hessian import Hessian
from microglia.criteria.lora_gradient import LoraGradient
from microglia.criteria.movement import Movement
from microglia.criteria.norm import Norm
from microglia.criteria.predictor import Predictor
from microglia.criteria.random import Random
from microglia.criteria.shapley import Shapley
from microglia.criteria.taylor import Taylor
from microglia.criteria.trained import Agents, StaticBaseline
from microglia.criteria.upper_layers import UpperLayers
from microglia.criteria.variational import Variational
from microglia.criteria.weight import Weight
from microglia.errors import ConfigError

CRITERIA: dict[str, type[Criterion]] = {
    "random": Random,
    "weight": Weight,
    "norm": Norm,
    "entropy": Entropy,
    "taylor": Taylor,
    "fluctuation": Fluctuation,
    "activation_variance": ActivationVariance,
    "static_baseline": StaticBaseline,
    "agents": Agents,
    "shapley": Shapley,
    "predictor": Predictor,
    "variational": Variational,
    "lora_gradient": LoraGradient,
    "hessian": Hessian,
    "upper_layers": UpperLayers,
    "movement": Movement,
    "cascade": Cascade,
    "expert": Expert,
}

__all__ = ["CRITERIA", "Calibration", "Criterion", "get_criterion"]


def get_criterion(name: str, **options: Any) -> Criterion:
    """The criterion called `name` with its own options. Raises ConfigError naming what exists."""
    if name not in CRITERIA:
        raise ConfigError(f"there is no criterion {name!r}; choose one of {', '.join(CRITERIA)}")
    known = [f.name for f in fields(CRITERIA[name])]  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in known]:
        allowed = f"its options are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"criterion {name} has no option {unknown[0]!r}; {allowed}")
    return CRITERIA[name](**options)
