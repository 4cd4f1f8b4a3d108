"""A keep plan: one decision for every prompt, made by the gate from what a policy says of many prompts or of one."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio
from microglia.pruner import Budget

PLANS = ("mean", "task", "prompt")


@dataclass(frozen=True)
class KeepPlan:
    """What is frozen: `keep` (H,) per site, hard and regular in shape.

    kind: `mean` is the mean logits over the checkpoint's calibration prompts, `task` those over a task's prompts,
        `prompt` the decision for one prompt. `prompts`: how many. `threshold`: of the gate that decided.
    adaptive_keep_ratio: what the same gate keeps of these prompts when each decides for itself, on average.
    """

    kind: str
    keep: tuple[Tensor, ...]
    prompts: int
    threshold: float
    adaptive_keep_ratio: float

    @classmethod
    def of_prompts(cls, kind: str, budget: Budget | None, gate: Gate) -> "KeepPlan":
        """The heads with the best mean logits, as many as the prompts keep on average when each decides for itself.

        budget: the logits of N prompts. Raises ConfigError without any prompt.
        """
        if budget is None or not budget.prompts:
            raise ConfigError(
                f"the plan {kind!r} needs prompts, but there are none to decide on; train first, or freeze a task's "
                "prompts (--plan task) or one prompt (--plan prompt)"
            )
        adaptive = budget.keep_ratio(gate.threshold)
        mean = replace(budget, logits=[x.float().mean(0, keepdim=True) for x in budget.logits], weights=None)
        frozen_gate = replace(gate, threshold=mean.threshold(adaptive))
        return cls(kind, _keep(mean, frozen_gate), budget.prompts, frozen_gate.threshold, adaptive)

    @classmethod
    def of_prompt(cls, budget: Budget, gate: Gate) -> "KeepPlan":
        """Exactly what `gate` decides for one prompt, whose logits are the budget's."""
        return cls("prompt", _keep(budget, gate), 1, gate.threshold, budget.keep_ratio(gate.threshold))

    @property
    def keep_ratio(self) -> float:
        return float(keep_ratio([k[None] for k in self.keep]))

    def summary(self) -> dict[str, Any]:
        """Ready for JSON; `heads` are the kept ones of every site."""
        return {
            "plan": self.kind,
            "prompts": self.prompts,
            "threshold": self.threshold,
            "keep_ratio": self.keep_ratio,
            "sparsity": 1 - self.keep_ratio,
            "adaptive_keep_ratio": self.adaptive_keep_ratio,
            "heads": [k.nonzero().flatten().tolist() for k in self.keep],
        }


def _keep(budget: Budget, gate: Gate) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(keep[0].cpu() for keep in gate.every([x.float() for x in budget.logits], budget.geometries))
