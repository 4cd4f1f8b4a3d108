"""A keep plan: one decision for every prompt, made by the gate from what a policy says of many prompts or of one."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio
from microglia.policies import CodebookPolicy
from microglia.pruner import Budget, Pruner

PLANS = ("mean", "task", "prompt", "codebook")


@dataclass(frozen=True)
class KeepPlan:
    """What is frozen: `keep` (H,) per site, hard and regular in shape.

    kind: `mean` is the mean logits over the checkpoint's calibration prompts, `task` those over a task's prompts,
        `prompt` the decision for one prompt, `codebook` one mask of a codebook, whose `prompts` are the calibration
        prompts that get it. `prompts`: how many. `threshold`: of the gate that decided.
    adaptive_keep_ratio: what the same gate keeps of these prompts when each decides for itself, on average.
    """

    kind: str
    keep: tuple[Tensor, ...]
    prompts: int
    threshold: float
    adaptive_keep_ratio: float

    @classmethod
    def of_prompts(cls, kind: str, pruner: Pruner) -> "KeepPlan":
        """The heads with the best mean logits, as many as the prompts keep on average when each decides for itself.

        The prompts are those of the pruner's budget. Raises ConfigError without any.
        """
        budget, gate = pruner.budget, pruner.gate
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
    def of_prompt(cls, pruner: Pruner) -> "KeepPlan":
        """Exactly what the pruner decides for one prompt, that of its budget."""
        budget, gate = pruner.budget, pruner.gate
        assert budget is not None
        return cls("prompt", _keep(budget, gate), 1, gate.threshold, budget.keep_ratio(gate.threshold))

    @classmethod
    def of_mask(cls, pruner: Pruner, mask: int | None) -> "KeepPlan":
        """One mask of a codebook: what the pruner decides for every prompt that the router gives it.

        Raises ConfigError for another policy or mask, or without a budget.
        """
        policy, budget, gate = pruner.policy, pruner.budget, pruner.gate
        if not isinstance(policy, CodebookPolicy):
            raise ConfigError(
                f"the plan 'codebook' takes one mask of a codebook, but this policy is {policy.name!r}; train with "
                "--policy codebook, or take the plan mean, task or prompt"
            )
        if mask is None or not 0 <= mask < policy.hidden_dim:
            raise ConfigError(
                f"mask={mask} was given; this codebook has the masks 0 to {policy.hidden_dim - 1}, give one"
            )
        if budget is None or not budget.prompts:
            raise ConfigError(
                "the plan 'codebook' needs the calibration prompts of training, but there are none; train it"
            )
        one = [x[mask : mask + 1].detach().float().cpu() for x in policy.masks]
        chosen = torch.stack([torch.isclose(x, y).all(-1) for x, y in zip(budget.logits, one, strict=True)]).all(0)
        keep = _keep(replace(budget, logits=one, weights=None), gate)
        return cls("codebook", keep, int(chosen.sum()), gate.threshold, budget.keep_ratio(gate.threshold))

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
