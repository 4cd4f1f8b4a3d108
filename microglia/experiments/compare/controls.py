"""Controls: what the agents' decisions are worth once the prompt is taken from them, or once time is made equal."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.policies import Policy, StaticPolicy
from microglia.pruner import Pruner
from microglia.reading import read_prompts

FROZEN, SHUFFLED, EQUAL_TIME = "frozen", "shuffled", "equal-time"
CONTROLS = (FROZEN, SHUFFLED, EQUAL_TIME)


def frozen(agents: Pruner, held_out: Setup) -> Policy:
    """The units that agents at a keep ratio keep most often on held-out prompts, as one static mask."""
    budget = held_out.calibrated(agents).budget
    assert budget is not None
    assert budget.weights is not None
    keep = agents.keep(budget.logits, budget.geometries)
    return StaticPolicy([budget.weights.to(k) @ k / budget.weights.sum() for k in keep])


def shuffled(agents: Pruner, held_out: Setup) -> Policy:
    """The agents, each prompt with the features of another one."""
    features = read_prompts(held_out.model, held_out.tokenizer, held_out.prompts, agents).features
    return Shuffled(agents.policy, features)


class Shuffled(Policy):
    """A policy that never sees the prompt it decides on: its features are those of some other prompt, held out.

    The other one is drawn by the prompt's own features, so that a decision does not depend on what else is in the
    batch, and it is never the prompt itself. features: (N, F) per site of N prompts, at least 2.
    """

    name: ClassVar[str] = SHUFFLED
    describes: ClassVar[str] = "agents that are shown another prompt"

    def __init__(self, policy: Policy, features: Sequence[Tensor]) -> None:
        super().__init__()
        if len(features[0]) < 2:
            raise ConfigError("features of one prompt were given to shuffle; hold out at least two")
        self.policy, self.signals = policy, policy.signals
        for index, x in enumerate(features):
            self.register_buffer(f"pool_{index}", x.detach().clone())

    @classmethod
    def create(cls, geometries: Sequence[Any], signals: Sequence[str], **options: Any) -> Self:
        raise ConfigError("shuffled agents are made of agents and cannot be trained; give --policies shuffled")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        pools = [self.get_buffer(f"pool_{index}") for index in range(len(features))]
        own, others = (torch.stack([x.double().sum(-1) for x in part]).sum(0) for part in (features, pools))
        drawn = (own * 1000).round().long() % len(others)
        drawn = torch.where(torch.isclose(others[drawn], own), (drawn + 1) % len(others), drawn)
        return self.policy([pool.to(x)[drawn] for pool, x in zip(pools, features, strict=True)])
