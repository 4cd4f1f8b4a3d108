"""How every experiment measures a pruner: its answers, and the loss of each worked answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microglia.evaluation.crossed import crossed_mean
from microglia.evaluation.run import Evaluation
from microglia.evaluation.setup import Setup
from microglia.evaluation.significance import wilson_ci
from microglia.pruner import Pruner
from microglia.results import Figures

Progress = Callable[[str, int, int], None]  # called with a name, what is done and how much there is


@dataclass(frozen=True)
class Measured:
    """A pruner's answers, and the loss of each worked answer."""

    answers: Evaluation
    losses: tuple[float, ...]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Measured":
        """What `measure` gave."""
        return cls(Evaluation.from_json(row), tuple(row["losses"]))


def answers(setup: Setup, pruner: Pruner | None, label: str, progress: Progress | None) -> dict[str, Any]:
    """An evaluation as a ledger keeps it; dense without a pruner."""
    update = (lambda done, total: progress(label, done, total)) if progress else None
    return setup.answers(pruner, update).to_json()


def measure(setup: Setup, pruner: Pruner | None, progress: Progress | None) -> dict[str, Any]:
    """Answers and losses as a ledger keeps them."""
    return {**answers(setup, pruner, "answers", progress), "losses": setup.losses(pruner)}


def right(runs: Sequence[Measured]) -> NDArray[np.float64]:
    """Right answers as 0 and 1, (S, N) of S seeds and N prompts."""
    return np.array([[float(a.correct) for a in run.answers.answers] for run in runs])


def losses(runs: Sequence[Measured]) -> NDArray[np.float64]:
    """Losses (S, N)."""
    return np.array([run.losses for run in runs])


def figures(runs: Sequence[Measured]) -> Figures:
    """Means over prompts and seeds. Seeds that all agree leave the interval of one."""
    correct = right(runs)
    accuracy, loss = crossed_mean(correct), crossed_mean(losses(runs))
    alike = len(runs) == 1 or float(np.ptp(correct)) == 0
    return Figures(
        keep_ratio=float(np.mean([1 - run.answers.sparsity for run in runs])),
        accuracy=accuracy.mean,
        ci95=wilson_ci(int(correct[0].sum()), correct.shape[1]) if alike else accuracy.ci95,
        loss=loss.mean,
        loss_ci95=loss.ci95,
        keep_ratio_per_token=float(np.mean([1 - run.answers.sparsity_per_token for run in runs])),
    )
