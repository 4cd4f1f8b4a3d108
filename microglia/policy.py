"""A policy turns the features of a prompt into one logit per head; above 0 means keep.

Agents, static masks, plain signals and predictors alike.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from microglia.agent import KEEP_AT_START, MaskMixture, MicrogliaAgent
from microglia.errors import ConfigError
from microglia.geometry import HeadGeometry
from microglia.signals import SIGNALS, feature_size


class Policy(nn.Module):
    """Base class. `features` says which signals `site_logits` wants: both, norm or entropy."""

    features: str = "both"
    all_at_once: str | None = None  # of a policy that cannot decide site by site: why

    def check_scope(self, scope: str) -> None:
        """Raise ConfigError if the policy cannot gate a prompt while it is read, site by site."""
        if scope == "all" and self.all_at_once:
            raise ConfigError(f"{self.all_at_once}; use scope='answer'")

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        """Features (B, F) of site `index` → logits (B, H)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a site decides; define site_logits")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of every site, (B, F) each → logits of every site, (B, H) each. Override it to look across sites."""
        return [self.site_logits(index, x) for index, x in enumerate(features)]

    def fingerprint(self) -> str:
        """The same for two policies that decide alike because their weights are the same, and for no others."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class AgentPolicy(Policy):
    """One MicrogliaAgent per site on features standardised with statistics of training prompts."""

    usual_hidden_dim = 128

    def __init__(
        self, geometries: Sequence[HeadGeometry], *, hidden_dim: int | None = None, features: str = "both"
    ) -> None:
        super().__init__()
        self.features, self.hidden_dim = features, hidden_dim or self.usual_hidden_dim
        sizes = [feature_size(g.heads, features) for g in geometries]
        self.agents = nn.ModuleList(
            self._agent(g.heads, size, sum(sizes)) for g, size in zip(geometries, sizes, strict=True)
        )
        for index, size in enumerate(sizes):
            self.register_buffer(f"mean_{index}", torch.zeros(size))
            self.register_buffer(f"std_{index}", torch.ones(size))

    def _agent(self, heads: int, own_features: int, all_features: int) -> nn.Module:
        return MicrogliaAgent(heads=heads, features=own_features, hidden_dim=self.hidden_dim)

    @torch.no_grad()
    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        """Take mean and standard deviation from the features (N, F) of N training prompts, per site."""
        for index, x in enumerate(features):
            self.get_buffer(f"mean_{index}").copy_(x.mean(0))
            self.get_buffer(f"std_{index}").copy_(x.std(0, correction=0).clamp(min=1e-6))

    @torch.no_grad()
    def start_from(self, logits: Sequence[Tensor], *, limit: float = float("inf")) -> None:
        """Start every agent at these logits (H,) per site: it then learns only what the input adds.

        limit: logits are clipped to ±limit; where a gate is sure of itself, hardly any gradient passes.
        """
        for agent, values in zip(self.agents, logits, strict=True):
            agent.start_from(values.clamp(-limit, limit))  # type: ignore[operator]

    def standardised(self, index: int, features: Tensor) -> Tensor:
        """Features (B, F) of site `index` as its agent wants them."""
        mean, std = self.get_buffer(f"mean_{index}"), self.get_buffer(f"std_{index}")
        return (features.to(mean) - mean) / std

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        return self.agents[index](self.standardised(index, features))


class MixturePolicy(AgentPolicy):
    """One MaskMixture of `hidden_dim` masks per site, which sees the features of every site before it decides."""

    usual_hidden_dim = 16
    all_at_once = "a mixture sees every site before it decides"

    def _agent(self, heads: int, own_features: int, all_features: int) -> nn.Module:
        return MaskMixture(heads=heads, features=all_features, masks=self.hidden_dim)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        seen = torch.cat([self.standardised(index, x) for index, x in enumerate(features)], -1)
        return [agent(seen) for agent in self.agents]

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        raise ConfigError(f"{self.all_at_once}; ask for all sites")


TRAINED_ON_INPUT: dict[str, type[AgentPolicy]] = {"agents": AgentPolicy, "mixture": MixturePolicy}


def new_agents(
    kind: str, geometries: Sequence[HeadGeometry], *, hidden_dim: int | None = None, features: str = "both"
) -> AgentPolicy:
    """Untrained agents of a kind: `agents` (MLPs) or `mixture`.

    hidden_dim: of an MLP, or the number of masks of a mixture; None is 128 and 16.
    Raises ConfigError for an unknown kind.
    """
    if kind not in TRAINED_ON_INPUT:
        raise ConfigError(f"policy={kind!r} is unknown; choose {' or '.join(TRAINED_ON_INPUT)}")
    return TRAINED_ON_INPUT[kind](geometries, hidden_dim=hidden_dim, features=features)


class StaticPolicy(Policy):
    """The same logits for every prompt. Trainable (the agents' static twin) or fixed (scores, random masks)."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        super().__init__()
        self.logits = nn.ParameterList(nn.Parameter(x.detach().clone().float()) for x in logits)

    @classmethod
    def all_kept(cls, geometries: Sequence[HeadGeometry]) -> "StaticPolicy":
        """Every head kept, as agents are before training."""
        return cls([torch.full((g.heads,), KEEP_AT_START) for g in geometries])

    @classmethod
    def random(cls, geometries: Sequence[HeadGeometry], seed: int) -> "StaticPolicy":
        """Independent uniform logits; a threshold turns them into a random mask of any keep ratio."""
        generator = torch.Generator().manual_seed(seed)
        return cls([torch.rand(g.heads, generator=generator) for g in geometries])

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        return self.logits[index].expand(len(features), -1)


class SignalPolicy(Policy):
    """Each prompt's own signal. `norm`: relative to the site's mean. `entropy`: one minus it, so focused heads stay."""

    def __init__(self, features: str) -> None:
        super().__init__()
        if features not in SIGNALS:
            raise ConfigError(f"features={features!r} is not one signal; choose {' or '.join(SIGNALS)}")
        self.features = features

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        return features / features.mean(-1, keepdim=True).clamp(min=1e-20) if self.features == "norm" else 1 - features


class PredictorPolicy(Policy):
    """One MLP that scores every head of every site from what was seen of the prompt at the first site."""

    all_at_once = "a predictor sees the first site only and decides for all at once"
    mean: Tensor
    std: Tensor

    def __init__(self, geometries: Sequence[HeadGeometry], *, hidden_dim: int = 128, features: str = "both") -> None:
        super().__init__()
        self.features, self.hidden_dim = features, hidden_dim
        self.sizes = [g.heads for g in geometries]
        size = feature_size(self.sizes[0], features)
        self.agent = MicrogliaAgent(heads=sum(self.sizes), features=size, hidden_dim=hidden_dim)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        """Take mean and standard deviation from the first site's features (N, F) of N prompts."""
        self.mean.copy_(features[0].mean(0))
        self.std.copy_(features[0].std(0, correction=0).clamp(min=1e-6))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(self.agent((features[0].to(self.mean) - self.mean) / self.std).split(self.sizes, -1))

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        raise ConfigError(f"{self.all_at_once}; ask for all sites")
