"""GRIFFIN: channels that carry much of their tokens' activation in the prompt carry it in the answer too."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.policies import Policy, SignalPolicy


@CRITERIA.register("griffin")
@dataclass(frozen=True, kw_only=True)
class Griffin(Criterion):
    """Root mean square over prompt tokens of the block's share of a token's activation norm; then over prompts."""

    name: ClassVar[str] = "griffin"
    score: ClassVar[str] = "L2 norm over prompt tokens of the channel's activation ÷ the token's activation norm"
    paper: ClassVar[str] = "Dong et al. 2024, GRIFFIN"
    departs: ClassVar[str] = "blocks of channels; one threshold over all layers in place of the same share in each"
    per_input: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("channel",)

    def adaptive(self, calibration: Calibration) -> Policy:
        return SignalPolicy("activation")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(SignalPolicy("activation"))]
