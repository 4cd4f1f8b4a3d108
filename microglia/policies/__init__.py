"""Who decides: agents and mixtures that learn from prompts, static masks, plain signals, a predictor."""

from collections.abc import Sequence
from typing import Any

from microglia.errors import ConfigError
from microglia.policies.agents import AgentPolicy, LearnedPolicy, MaskMixture, MicrogliaAgent, MixturePolicy
from microglia.policies.base import POLICIES, Policy, SitewisePolicy
from microglia.policies.codebook import CodebookPolicy
from microglia.policies.fixed import SignalPolicy, StaticPolicy
from microglia.policies.layers import LayerPolicy
from microglia.policies.predictor import PredictorPolicy
from microglia.registry import listed
from microglia.signals import check_signals
from microglia.units import Geometry

__all__ = [
    "POLICIES",
    "AgentPolicy",
    "CodebookPolicy",
    "LayerPolicy",
    "LearnedPolicy",
    "MaskMixture",
    "MicrogliaAgent",
    "MixturePolicy",
    "Policy",
    "PredictorPolicy",
    "SignalPolicy",
    "SitewisePolicy",
    "StaticPolicy",
    "agent_kinds",
    "new_agents",
]


def agent_kinds() -> list[str]:
    """Names of the policies that learn from prompts."""
    return [name for name, kind in POLICIES.items() if issubclass(kind, LearnedPolicy)]


def new_agents(
    name: str, geometries: Sequence[Geometry], *, signals: str | Sequence[str] = ("norm", "entropy"), **options: Any
) -> LearnedPolicy:
    """Untrained agents: `agents` or `layers` (MLPs of hidden_dim 128, per site or per layer), `mixture` (hidden_dim: 16
    masks), `codebook` (hidden_dim: 8 masks), or a kind of your own.

    Raises ConfigError for an unknown kind.
    """
    kind = POLICIES.get(name)
    if kind is None or not issubclass(kind, LearnedPolicy):
        raise ConfigError(f"policy={name!r} is unknown; choose {listed(agent_kinds())}")
    return kind.create(geometries, check_signals(signals), **options)
