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
    """One way to tell which heads matter. To add one: a frozen dataclass, registered in CRITERIA.

    name: in the registry. score: what it measures. paper: whom it follows. departs: where it does not.
    per_input: whether it can score each prompt. fill: what its paper lets pruned heads leave behind.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    paper: ClassVar[str]
    departs: ClassVar[str]
    per_input: ClassVar[bool] = False
    fill: ClassVar[Fill] = "zero"

    @abstractmethod
    def scores(self, calibration: Calibration) -> list[Tensor]:
        """One score per head, (H,) per site; higher = keep, comparable between sites. Call it through `policy`."""

    def adaptive(self, calibration: Calibration) -> Policy:
        """The policy that scores each prompt. Only criteria with `per_input` have one."""
        raise NotImplementedError(f"{self.name} says that it scores each prompt, but not how; define adaptive")

    def policy(self, calibration: Calibration, *, per_input: bool = False) -> Policy:
        """Logits for the gate: the same for every prompt, or of each prompt's own. The model is left as it was.

        Static logits are ranks of the scores in (-1, 1), 0 between the better and the worse half. Raises ConfigError
        for `per_input` with a criterion that cannot score each prompt.
        """
        if per_input and not self.per_input:
            raise ConfigError(f"{self.name} scores heads the same for every prompt; leave per_input out")
        with untouched(calibration):
            policy = self.adaptive(calibration) if per_input else self.static(calibration)
        return policy.to(calibration.device).requires_grad_(False).eval()

    def pruner(self, calibration: Calibration, *, per_input: bool = False) -> Pruner:
        """The policy as a pruner, with the recovery that was trained along where one was."""
        return calibration.pruner(self.policy(calibration, per_input=per_input))

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
    """Scores (H,) per site → their ranks over all sites, evenly in (-1, 1); equal scores stay equal.

    Only order decides in the gate, so nothing is lost; scores of any size then suit float32 and a budget's search.
    """
    values, place = torch.cat(list(scores)).unique(return_inverse=True)
    ranks = (2 * place + 1) / len(values) - 1
    return list(ranks.split([len(x) for x in scores]))


def relative(x: Tensor) -> Tensor:
    """(..., H) divided by its mean over the site's heads: norms grow with depth, their shares of a site do not."""
    return x / x.mean(-1, keepdim=True).clamp(min=1e-20)


def unit_length(x: Tensor) -> Tensor:
    """(..., H) of one site divided by its L2 norm, as Michel et al. (2019) normalise per layer."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-20)


def standardised(x: Tensor) -> Tensor:
    """(H,) of one site with mean 0 and standard deviation 1, as FLAP compares layers."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-20)


def check_positive(**options: float) -> None:
    """Raise ConfigError for the first option that is not above 0."""
    for name, value in options.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} was given; it must be above 0")
