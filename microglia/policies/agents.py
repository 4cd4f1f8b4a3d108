"""Agents: small networks, one per site, that read a prompt's features: an MLP each, or a mixture of a few masks."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from microglia.errors import ConfigError
from microglia.policies.base import POLICIES, Policy, Standardiser, standardised
from microglia.signals import feature_size
from microglia.units import Geometry

KEEP_AT_START = 2.0  # logit of every unit before training: sigmoid(2) = 0.88, all kept, and the gradient still flows
MASK_SCALE = 5.0  # Adam moves every parameter by the learning rate; a logit has further to go than a router's weight


class Agent(nn.Module):
    """From standardised features (B, F) to logits (B, U)."""

    @abstractmethod
    def start_from(self, logits: Tensor) -> None:
        """Start at these logits (U,) for every prompt."""


class MicrogliaAgent(Agent):
    """`Linear(features, hidden_dim) → GELU → Linear(hidden_dim, units)`; logits above 0 mean keep.

    The last layer starts at small weights and a positive bias: at the start every unit of every prompt is kept.
    """

    def __init__(self, *, units: int, features: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(features, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, units))
        nn.init.normal_(self.last.weight, std=0.01)
        self.start_from(torch.full((units,), KEEP_AT_START))

    @property
    def last(self) -> nn.Linear:
        """The layer whose bias is what every prompt gets."""
        layer = self.network[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def start_from(self, logits: Tensor) -> None:
        self.last.bias.copy_(logits)

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, F) → logits (B, U)."""
        logits: Tensor = self.network(features)
        return logits


class Masks(Agent):
    """A few masks of learned logits: `weights · (masks, units)`."""

    def __init__(self, *, units: int, masks: int) -> None:
        super().__init__()
        self.masks = nn.Parameter(torch.empty(masks, units))
        self.start_from(torch.full((units,), KEEP_AT_START))

    @torch.no_grad()
    def start_from(self, logits: Tensor) -> None:
        self.masks.copy_((logits / MASK_SCALE).expand_as(self.masks))

    def forward(self, weights: Tensor) -> Tensor:
        """What every mask counts for in each prompt, (B, K) with a sum of 1 → its logits (B, U)."""
        logits: Tensor = weights @ self.masks * MASK_SCALE
        return logits


class MaskMixture(Masks):
    """`softmax(Linear(features, masks)) · (masks, units)`: a prompt's logits lie between those of a few learned masks.

    Experts and their gate as in Jacobs et al. 1991 (Adaptive Mixtures of Local Experts), each expert one constant mask.
    """

    def __init__(self, *, units: int, features: int, masks: int) -> None:
        super().__init__(units=units, masks=masks)
        self.router = nn.Linear(features, masks)
        nn.init.normal_(self.router.weight, std=2 * features**-0.5)  # prompts differ from the start, so masks can too

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, F) → logits (B, U)."""
        return super().forward(self.router(features).softmax(-1))


class LearnedPolicy(Policy):
    """Agents on features standardised with statistics of training prompts: one agent and one Standardiser per site."""

    trains: ClassVar[bool] = True
    default_hidden_dim: ClassVar[int]

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        hidden_dim: int | None = None,
        signals: Sequence[str] = ("norm", "entropy"),
    ) -> None:
        super().__init__()
        self.signals, self.hidden_dim = tuple(signals), hidden_dim or self.default_hidden_dim
        sizes = [feature_size(geometry, signals) for geometry in geometries]
        self.agents = nn.ModuleList(self._agents([g.count for g in geometries], sizes))
        self.statistics = nn.ModuleList(Standardiser(size) for size in sizes)

    def _agents(self, units: Sequence[int], features: Sequence[int]) -> list[Agent]:
        """The untrained agents, of sites with so many units and features."""
        return [self._agent(count, size, sum(features)) for count, size in zip(units, features, strict=True)]

    @abstractmethod
    def _agent(self, units: int, site_features: int, all_features: int) -> Agent:
        """The untrained agent of one site."""

    @classmethod
    def create(cls, geometries: Sequence[Geometry], signals: Sequence[str], **options: Any) -> Self:
        return cls(geometries, signals=signals, **options)

    def options(self) -> dict[str, Any]:
        return {"hidden_dim": self.hidden_dim}

    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        for standardiser, x in zip(self.statistics, features, strict=True):
            assert isinstance(standardiser, Standardiser)
            standardiser.fit(x)

    def start_from(self, logits: Sequence[Tensor], *, limit: float = float("inf")) -> None:
        """Start every agent at these logits (U,) per site: it then learns only what the input adds.

        limit: logits are clipped to ±limit; where a gate is sure of itself, hardly any gradient passes.
        """
        for agent, values in zip(self.agents, logits, strict=True):
            assert isinstance(agent, Agent)
            agent.start_from(values.clamp(-limit, limit))

    def standardised(self, index: int, features: Tensor) -> Tensor:
        standardised: Tensor = self.statistics[index](features)
        return standardised

    def joined(self, features: Sequence[Tensor]) -> Tensor:
        """Standardised features of all sites side by side, (B, F)."""
        return torch.cat([self.standardised(index, x) for index, x in enumerate(features)], -1)


@POLICIES.register("agents")
class AgentPolicy(LearnedPolicy):
    """One MicrogliaAgent of `hidden_dim` per site, which sees that site's features."""

    name: ClassVar[str] = "agents"
    describes: ClassVar[str] = "input-adaptive agents"
    default_hidden_dim: ClassVar[int] = 128

    def _agent(self, units: int, site_features: int, all_features: int) -> Agent:
        if site_features == 0:
            raise ConfigError(
                f"signals={','.join(self.signals)!r} are not measured at every kind of unit that is decided about, so "
                "some agents would see nothing; add a signal of those units or choose policy='mixture'"
            )
        return MicrogliaAgent(units=units, features=site_features, hidden_dim=self.hidden_dim)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) > 1 and len({(x.shape, x.dtype, x.device) for x in features}) == 1 and self._are_alike:
            return self._together(torch.stack(list(features)))
        return [agent(self.standardised(i, x)) for i, (agent, x) in enumerate(zip(self.agents, features, strict=True))]

    @property
    def _are_alike(self) -> bool:
        """Whether all agents have the same shapes, on the same device."""
        lasts = [agent.last.weight for agent in self.agents if isinstance(agent, MicrogliaAgent)]
        return len(lasts) == len(self.agents) and len({(x.shape, x.dtype, x.device) for x in lasts}) == 1

    def _together(self, x: Tensor) -> list[Tensor]:
        """Features (L, B, F) → logits (B, U) of every site, by a few products for all agents.

        Agent by agent it would be half a dozen small kernels a site, which takes a GPU longer to launch than to run.
        """

        def every(name: str, modules: nn.ModuleList) -> Tensor:
            return torch.stack([module.get_parameter(name) for module in modules])

        mean, std = (torch.stack([s.get_buffer(name) for s in self.statistics]) for name in ("mean", "std"))
        x = standardised(x, mean[:, None], std[:, None])
        weight, bias = every("network.0.weight", self.agents), every("network.0.bias", self.agents)
        hidden = nn.functional.gelu(torch.baddbmm(bias[:, None], x, weight.mT))
        weight, bias = every("network.2.weight", self.agents), every("network.2.bias", self.agents)
        return list(torch.baddbmm(bias[:, None], hidden, weight.mT).unbind())


@POLICIES.register("mixture")
class MixturePolicy(LearnedPolicy):
    """One MaskMixture of `hidden_dim` masks per site, which sees the features of every site before it decides."""

    name: ClassVar[str] = "mixture"
    describes: ClassVar[str] = "input-adaptive agents, each mixing a few learned masks"
    default_hidden_dim: ClassVar[int] = 16

    def _agent(self, units: int, site_features: int, all_features: int) -> Agent:
        return MaskMixture(units=units, features=all_features, masks=self.hidden_dim)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        every = self.joined(features)
        return [agent(every) for agent in self.agents]
