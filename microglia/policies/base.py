"""A policy turns the features of a prompt into one logit per unit; above 0 means keep."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from microglia.registry import Registry
from microglia.units import Geometry


class Policy(nn.Module, ABC):
    """Base class. To add one: a subclass, registered in POLICIES.

    name: in the registry and in checkpoints. describes: what it is, for model cards. trains: whether it learns from
    prompts, with the trainer. signals: names of the signals that its features are made of, in their order.
    """

    name: ClassVar[str]
    describes: ClassVar[str] = ""
    trains: ClassVar[bool] = False
    signals: tuple[str, ...] = ("norm", "entropy")

    @classmethod
    @abstractmethod
    def create(cls, geometries: Sequence[Geometry], signals: Sequence[str], **options: Any) -> Self:
        """An untrained policy for sites of these geometries; `options` are those that `options()` returns.

        Also made on the meta device, to compare its shapes with those of a checkpoint.
        """

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of every site, (B, F) each → logits of every site, (B, U) each."""

    def options(self) -> dict[str, Any]:
        """What `create` needs beside geometries and signals to make a policy of this kind and size; JSON-ready."""
        return {}

    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        """Take what is needed to standardise from the features (N, F) of N training prompts, per site."""

    def standardised(self, index: int, features: Tensor) -> Tensor | None:
        """Features (B, F) of a site in standard deviations from those of training; None where none are kept."""
        return None

    def fingerprint(self) -> str:
        """The same for two policies that decide alike because their weights are the same, and for no others."""
        digest = hashlib.sha256(f"{self.name}{self.signals}{sorted(self.options().items())}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class SitewisePolicy(Policy):
    """A policy that decides on each site from that site's features alone."""

    @abstractmethod
    def site_logits(self, index: int, features: Tensor) -> Tensor:
        """Features (B, F) of site `index` → logits (B, U)."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self.site_logits(index, x) for index, x in enumerate(features)]


POLICIES: Registry[type[Policy]] = Registry("policy")


LEAST_VARIATION = 1e-3  # of a feature, relative to its mean: what varies less is rounding, and is not blown up
MOST_DEVIATIONS = 8.0  # from the mean: a prompt further away says nothing that training could have learned


class Standardiser(nn.Module):
    """Features minus their mean over training prompts, divided by their standard deviation, clipped."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """From the features (N, F) of N prompts."""
        mean = features.mean(0)
        self.mean.copy_(mean)
        self.std.copy_(features.std(0, correction=0).clamp(min=1e-6).maximum(LEAST_VARIATION * mean.abs()))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) → (B, F), in the statistics' own type."""
        return standardised(features, self.mean, self.std)


def standardised(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Features in standard deviations from their mean, clipped, in the statistics' own type."""
    return ((features.to(mean) - mean) / std).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
