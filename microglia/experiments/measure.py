"""How every experiment measures a policy: its answers, its losses, and the gate of a keep ratio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from microglia.evaluation.bench import Bench, as_json, from_json
from microglia.evaluation.crossed import crossed_mean
from microglia.evaluation.run import Evaluation
from microglia.evaluation.significance import wilson_ci
from microglia.gate import Gate, threshold_for
from microglia.policy import Policy
from microglia.results import Figures
from microglia.sites import find_sites
from microglia.training.held_out import answer_losses

Progress = Callable[[str, int, int], None]  # called with a name, what is done and how much there is
Budget = Callable[[float | None], Gate]  # keep ratio → gate; None is the decision that the policy was trained to


@dataclass(frozen=True)
class Measured:
    """A policy's answers, and the loss of each worked answer."""

    answers: Evaluation
    losses: tuple[float, ...]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Measured":
        """What `measure` gave."""
        return cls(from_json(row), tuple(row["losses"]))


def answers(setup: Bench, policy: Policy | None, gate: Gate | None, label: str, progress: Progress | None) -> Any:
    """An evaluation as a ledger keeps it; dense when `policy` is None."""
    update = (lambda done, total: progress(label, done, total)) if progress else None
    return as_json(setup.answers(policy, gate, update))


def measure(setup: Bench, policy: Policy | None, gate: Gate | None, progress: Progress | None) -> dict[str, Any]:
    """Answers and losses as a ledger keeps them."""
    losses = answer_losses(
        setup.model,
        setup.tokenizer,
        setup.examples,
        policy,
        template=setup.task.template,
        gate=gate,
        look=setup.look,
        fill=setup.fill,
        scope=setup.scope,
        batch_size=setup.batch_size,
    )
    return {**answers(setup, policy, gate, "answers", progress), "losses": losses}


def budget(held_out: Bench, policy: Policy, gate: Gate) -> Budget:
    """Keep ratios as thresholds on held-out prompts, which are read when the first is needed."""
    geometries = [site.geometry for site in find_sites(held_out.model)]

    @cache
    def logits() -> list[Tensor]:
        return held_out.logits(policy)

    def gate_at(ratio: float | None) -> Gate:
        if ratio is None:
            return gate
        return replace(gate, threshold=threshold_for(logits(), geometries, ratio, gate.bucket))

    return gate_at


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
    )
