"""A stand-in for the criteria with their interface, made of policies that need no training."""

from dataclasses import dataclass
from typing import Any

import torch

from microglia.criteria import Calibration
from microglia.errors import ConfigError
from microglia.policy import StaticPolicy
from microglia.sites import find_sites
from tests.tiny import wild_policy


@dataclass(frozen=True)
class Stub:
    """Random logits of the calibration's seed; the same for every seed when it is called static_baseline."""

    kind: str
    made: list
    config: Any = None

    def policy(self, calibration: Calibration, *, per_input: bool = False):
        self.made.append((self.kind, calibration.seed, len(calibration.examples), per_input, self.config))
        if per_input:
            return wild_policy(calibration.model)
        geometries = [site.geometry for site in find_sites(calibration.model)]
        with torch.no_grad():
            return StaticPolicy.random(geometries, 7 + calibration.seed * (self.kind != "static_baseline"))


def stub_criterion(made: list):
    """`get_criterion`; `made` gets a line for every policy that is made."""

    def get_criterion(name: str, **options: Any) -> Stub:
        if name not in ("static_baseline", "random", "norm"):
            raise ConfigError(f"there is no criterion {name!r}; choose one of static_baseline, random, norm")
        return Stub(name, made, **options)

    return get_criterion
