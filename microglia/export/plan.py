"""A keep plan: one decision for every prompt, made by the gate from what a policy says of many prompts or of one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio, threshold_for
from microglia.geometry import HeadGeometry

PLANS = ("mean", "task", "prompt")


@dataclass(frozen=True)
class KeepPlan:
    """What is frozen: `keep` (H,) per site, hard and rectangular.

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
    def of_prompts(
        cls, kind: str, logits: Sequence[Tensor], geometries: Sequence[HeadGeometry], gate: Gate
    ) -> "KeepPlan":
        """The heads with the best mean logits, as many as the prompts keep on average when each decides for itself.

        `logits` (N, H) per site of N prompts. Raises ConfigError without any prompt.
        """
        if not len(logits) or not len(logits[0]):
            raise ConfigError(
                f"the plan {kind!r} needs prompts, but there are none to decide on; train first, or freeze a task's "
                "prompts (--plan task) or one prompt (--plan prompt)"
            )
        adaptive = _mean_ratio(logits, geometries, gate)
        mean = [x.float().mean(0, keepdim=True) for x in logits]
        frozen_gate = replace(gate, threshold=threshold_for(mean, geometries, adaptive, gate.bucket))
        return cls(kind, _keep(mean, geometries, frozen_gate), len(logits[0]), frozen_gate.threshold, adaptive)

    @classmethod
    def of_prompt(cls, logits: Sequence[Tensor], geometries: Sequence[HeadGeometry], gate: Gate) -> "KeepPlan":
        """Exactly what `gate` decides for one prompt, `logits` (1, H) per site."""
        keep = _keep(logits, geometries, gate)
        return cls("prompt", keep, 1, gate.threshold, _mean_ratio(logits, geometries, gate))

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


def _keep(logits: Sequence[Tensor], geometries: Sequence[HeadGeometry], gate: Gate) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(keep[0].cpu() for keep in gate.every([x.float() for x in logits], geometries))


def _mean_ratio(logits: Sequence[Tensor], geometries: Sequence[HeadGeometry], gate: Gate) -> float:
    return float(keep_ratio(gate.every(logits, geometries)).mean())
