"""Block influence: a sublayer that hardly turns the residual stream may go."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion
from microglia.criteria.calibration import Calibration
from microglia.policies import Policy, SignalPolicy


@CRITERIA.register("block_influence")
@dataclass(frozen=True, kw_only=True)
class BlockInfluence(Criterion):
    """One minus the mean cosine, over prompt tokens, of the residual stream before and after the sublayer."""

    name: ClassVar[str] = "block_influence"
    score: ClassVar[str] = "1 − mean cosine of the residual stream before and after the sublayer"
    paper: ClassVar[str] = "Men et al. 2024, ShortGPT; sublayers as Siddiqui et al. 2024 and He et al. 2024"
    departs: ClassVar[str] = "attention and MLP each by itself in place of whole layers; over prompt tokens"
    per_input: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("sublayer",)

    def adaptive(self, calibration: Calibration) -> Policy:
        return SignalPolicy("cosine")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(SignalPolicy("cosine"))]
