"""A stand-in for the criteria with their interface, made of policies that need no training."""

from dataclasses import dataclass
from typing import Any

import torch

from microglia.criteria import CRITERIA, Calibration
from microglia.policies import StaticPolicy
from tests.tiny import geometries_of, wild_policy


@dataclass(frozen=True)
class Stub:
    """Random logits of the calibration's seed; as static_baseline the same for every seed."""

    kind: str
    made: list
    config: Any = None
    fill: str = "zero"

    def pruner(self, calibration: Calibration, *, per_input: bool = False):
        return calibration.pruner(self.policy(calibration, per_input=per_input))

    def policy(self, calibration: Calibration, *, per_input: bool = False):
        examples = len(calibration.examples)
        self.made.append((self.kind, calibration.seed, examples, per_input, self.config))
        if per_input:
            return wild_policy(calibration.model)
        seed = 7 if self.kind == "static_baseline" else 7 + calibration.seed
        with torch.no_grad():
            return StaticPolicy.random(geometries_of(calibration.model), seed)


def stub_criterion(made: list):
    """`get_criterion`; `made` gets a line for every policy that is made."""

    def get_criterion(name: str, **options: Any) -> Stub:
        _ = CRITERIA[name]  # refuses unknown names
        return Stub(name, made, **options)

    return get_criterion
