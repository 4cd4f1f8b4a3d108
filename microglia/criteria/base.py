"""What a criterion is: calibration prompts in, a policy out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from microglia.criteria.calibration import Calibration, untouched
from microglia.errors import ConfigError, MicrogliaError
from microglia.policies import Policy, StaticPolicy
from microglia.pruner import Fill, Pruner
from microglia.registry import Registry


class Criterion(ABC):
    """One way to tell which units matter. To add one: a frozen dataclass, registered in CRITERIA.

    name: in the registry. score: what it measures. paper: whom it follows. departs: where it does not.
    per_input: whether it can score each prompt. fill: what its paper lets pruned units leave behind. examples: to
    calibrate on unless told otherwise; gradients need more of them than norms before two draws give the same mask.
    units: the kinds that it can score. together: whether scores of several kinds can be compared.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    paper: ClassVar[str]
    departs: ClassVar[str]
    per_input: ClassVar[bool] = False
    fill: ClassVar[Fill] = "zero"
    examples: ClassVar[int] = 128
    units: ClassVar[tuple[str, ...]] = ("head",)
    together: ClassVar[bool] = False

    @abstractmethod
    def scores(self, calibration: Calibration) -> list[Tensor]:
        """One score per unit, (U,) per site; higher = keep, comparable between sites. Call it through `policy`."""

    def adaptive(self, calibration: Calibration) -> Policy:
        """The policy that scores each prompt. Only criteria with `per_input` have one."""
        raise NotImplementedError(f"{self.name} says that it scores each prompt, but not how; define adaptive")

    def policy(self, calibration: Calibration, *, per_input: bool = False) -> Policy:
        """Logits for the gate: the same for every prompt, or of each prompt's own. The model is left as it was.

        Static logits are ranks of the scores in (-1, 1), 0 between the better and the worse half. Raises ConfigError
        for `per_input` with a criterion that cannot score each prompt, and for units that it cannot score.
        """
        if per_input and not self.per_input:
            raise ConfigError(f"{self.name} scores units the same for every prompt; leave per_input out")
        self.check_units(calibration)
        with untouched(calibration):
            policy = self.adaptive(calibration) if per_input else self.static(calibration)
        return policy.to(calibration.device).requires_grad_(False).eval()

    def pruner(self, calibration: Calibration, *, per_input: bool = False) -> Pruner:
        """The policy as a pruner, with the recovery that was trained along where one was."""
        return calibration.pruner(self.policy(calibration, per_input=per_input))

    def check_units(self, calibration: Calibration) -> None:
        """Raise ConfigError unless the calibration's units are among those that this criterion scores."""
        given = calibration.units
        if not {*given} <= {*self.units} or (len(given) > 1 and not self.together):
            one = "" if self.together or len(self.units) == 1 else ", one kind at a time"
            raise ConfigError(
                f"units={','.join(given)!r} was given, but {self.name} scores {' and '.join(self.units)}{one}; choose "
                "another criterion or other units"
            )

    def static(self, calibration: Calibration) -> Policy:
        """The policy that is the same for every prompt."""
        scores = [x.detach().float().cpu() for x in self.scores(calibration)]
        if not all(bool(x.isfinite().all()) for x in scores):
            raise MicrogliaError(
                f"{self.name} gave scores that are not finite; load the model in float32 or calibrate on other examples"
            )
        return StaticPolicy(ranked(scores))


CRITERIA: Registry[type[Criterion]] = Registry("criterion")


def ranked(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores (U,) per site → their ranks over all sites, evenly in (-1, 1); equal scores stay equal.

    Only order decides in the gate, so nothing is lost; scores of any size then suit float32 and a budget's search.
    """
    values, place = torch.cat(list(scores)).unique(return_inverse=True)
    ranks = (2 * place + 1) / len(values) - 1
    return list(ranks.split([len(x) for x in scores]))


def relative(x: Tensor) -> Tensor:
    """(..., U) divided by its mean over the site's units: norms grow with depth, their shares of a site do not."""
    return x / x.mean(-1, keepdim=True).clamp(min=1e-20)


def unit_length(x: Tensor) -> Tensor:
    """(..., U) of one site divided by its L2 norm, as Michel et al. (2019) normalise per layer."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-20)


def standardised(x: Tensor) -> Tensor:
    """(U,) of one site with mean 0 and standard deviation 1, as FLAP compares layers."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-20)


def check_positive(**options: float) -> None:
    """Raise ConfigError for the first option that is not above 0."""
    for name, value in options.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} was given; it must be above 0")
