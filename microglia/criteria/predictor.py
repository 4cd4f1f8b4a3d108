"""A predictor: one MLP at the first site that knows which heads this prompt will need."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.criteria.base import CRITERIA, Criterion, check_positive, unit_length
from microglia.criteria.calibration import Calibration
from microglia.policies import Policy, PredictorPolicy


@CRITERIA.register("predictor")
@dataclass(frozen=True, kw_only=True)
class Predictor(Criterion):
    """An MLP on the first site's features, fitted by squared error to |∂loss/∂keep| of each prompt's answer."""

    hidden_dim: int = 128
    signals: tuple[str, ...] = ("norm", "entropy")
    steps: int = 300
    learning_rate: float = 3e-3

    name: ClassVar[str] = "predictor"
    examples: ClassVar[int] = 512
    score: ClassVar[str] = "|∂loss/∂keep| of this prompt, as an MLP at the first site predicts it"
    paper: ClassVar[str] = "Akhauri et al. 2024, ShadowLLM"
    departs: ClassVar[str] = (
        "sees the first site's signals, not its activations; decides once per prompt, not per token"
    )
    per_input: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(hidden_dim=self.hidden_dim, steps=self.steps, learning_rate=self.learning_rate)

    def adaptive(self, calibration: Calibration) -> Policy:
        policy = PredictorPolicy(calibration.geometries, hidden_dim=self.hidden_dim, signals=self.signals)
        nn.init.zeros_(policy.agent.last.bias)
        features = calibration.readings(policy).features
        policy.cpu().fit_statistics(features)
        wanted = targets(calibration)
        optimiser = torch.optim.AdamW(policy.parameters(), self.learning_rate, weight_decay=1e-2)
        for _ in range(self.steps):
            optimiser.zero_grad()
            F.mse_loss(torch.cat(policy(features), -1), wanted).backward()
            optimiser.step()
        return policy

    def scores(self, calibration: Calibration) -> list[Tensor]:
        return [x.mean(0) for x in calibration.logits(self.adaptive(calibration))]


def targets(calibration: Calibration) -> Tensor:
    """What the MLP learns: |∂loss/∂keep| of each prompt, L2-normalised per site, standardised over all, (N, Σ H)."""
    slopes = torch.cat([unit_length(x.abs()) for x in calibration.keep_gradients()], -1)
    return (slopes - slopes.mean()) / slopes.std(correction=0).clamp(min=1e-20)
