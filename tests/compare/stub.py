"""A stand-in for the package of criteria with its interface, made of policies that need no training."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from microglia.errors import ConfigError
from microglia.look import Look
from microglia.policy import StaticPolicy
from microglia.sites import find_sites
from tests.tiny import wild_policy


@dataclass(frozen=True)
class Calibration:
    """What a criterion is given."""

    model: Any
    tokenizer: Any
    task: Any
    examples: Any
    look: Look = field(default_factory=Look)
    bucket: int | None = None
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Stub:
    """Random logits of the calibration's seed; the same for every seed when it is called gate."""

    kind: str
    made: list
    config: Any = None

    def policy(self, calibration: Calibration, *, per_input: bool = False):
        self.made.append((self.kind, calibration.seed, len(calibration.examples), per_input, self.config))
        if per_input:
            return wild_policy(calibration.model)
        geometries = [site.geometry for site in find_sites(calibration.model)]
        with torch.no_grad():
            return StaticPolicy.random(geometries, 7 + calibration.seed * (self.kind != "gate"))


def stub_criteria(made: list) -> ModuleType:
    """The module; `made` gets a line for every policy that is asked for."""
    module: Any = ModuleType("microglia.criteria")

    def get_criterion(name: str, **options: Any) -> Stub:
        if name not in ("gate", "random", "norm"):
            raise ConfigError(f"there is no criterion {name!r}; choose one of gate, random, norm")
        return Stub(name, made, **options)

    module.CRITERIA, module.get_criterion, module.Calibration = {}, get_criterion, Calibration
    return module
