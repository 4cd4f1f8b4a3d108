"""Policies that learn nothing from a prompt: one mask for all of them, or a prompt's own signal."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from microglia.errors import ConfigError
from microglia.policies.agents import KEEP_AT_START
from microglia.policies.base import POLICIES, SitewisePolicy
from microglia.registry import listed
from microglia.signals import SIGNALS
from microglia.units import Geometry


@POLICIES.register("static")
class StaticPolicy(SitewisePolicy):
    """The same logits for every prompt. Trainable (the static baseline of agents) or fixed (scores, random masks)."""

    name: ClassVar[str] = "static"
    describes: ClassVar[str] = "one static mask for every prompt"
    trains: ClassVar[bool] = True
    signals: tuple[str, ...] = ()

    def __init__(self, logits: Sequence[Tensor]) -> None:
        super().__init__()
        self.logits = nn.ParameterList(nn.Parameter(x.detach().clone().float()) for x in logits)

    @classmethod
    def create(cls, geometries: Sequence[Geometry], signals: Sequence[str], **options: Any) -> Self:
        return cls([torch.full((g.count,), KEEP_AT_START) for g in geometries])

    @classmethod
    def all_kept(cls, geometries: Sequence[Geometry]) -> Self:
        """Every unit kept, as agents are before training."""
        return cls.create(geometries, ())

    @classmethod
    def random(cls, geometries: Sequence[Geometry], seed: int) -> Self:
        """Independent uniform logits; a threshold turns them into a random mask of any keep ratio."""
        generator = torch.Generator().manual_seed(seed)
        return cls([torch.rand(g.count, generator=generator) for g in geometries])

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        logits: Tensor = self.logits[index].expand(len(features), -1)
        return logits


@POLICIES.register("signal")
class SignalPolicy(SitewisePolicy):
    """Each prompt's own signal, as the signal itself ranks units (`Signal.score`)."""

    name: ClassVar[str] = "signal"
    describes: ClassVar[str] = "each prompt's own signal, nothing learned"

    def __init__(self, signal: str) -> None:
        super().__init__()
        if signal not in SIGNALS:
            raise ConfigError(f"signals={signal!r} is not one signal; choose {listed(SIGNALS)}")
        self.signals = (signal,)

    @classmethod
    def create(cls, geometries: Sequence[Geometry], signals: Sequence[str], **options: Any) -> Self:
        if len(signals) != 1:
            raise ConfigError(f"signals={','.join(signals)!r} is not one signal; choose {listed(SIGNALS)}")
        return cls(signals[0])

    def site_logits(self, index: int, features: Tensor) -> Tensor:
        if features.shape[-1] == 0:
            raise ConfigError(
                f"signals={self.signals[0]!r} is not measured at every kind of unit that is decided about, so it alone "
                "cannot decide; choose agents or a static policy for several kinds"
            )
        return SIGNALS[self.signals[0]].score(features)
