"""The one value that is trained, saved, loaded, served, compared and attached: who decides, and by which rules."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from microglia.errors import ConfigError, check_choice, check_range
from microglia.gate import Gate, keep_ratio
from microglia.policies import Policy
from microglia.recovery import Recovery
from microglia.signals import SIGNALS, MeanOutput, Signal
from microglia.units import UNITS, Geometry

Fill = Literal["zero", "mean"]
THRESHOLDS = 1024  # that a budget remembers; each takes forty passes over its logits to find


@dataclass(frozen=True, eq=False)
class Budget:
    """From a keep ratio to a threshold: a policy's logits on calibration prompts.

    logits: (N, U) per site for N prompts that should be like those to come and unlike those that trained the policy.
    bucket, least_kept: of the gate. weights: (N,), what each prompt counts for, the tokens of its answer, since time is
    spent per token; None where all count alike.
    """

    logits: Sequence[Tensor]
    geometries: Sequence[Geometry]
    bucket: int | None = None
    weights: Tensor | None = None
    least_kept: float = 0.0

    @property
    def prompts(self) -> int:
        """How many prompts stand behind it."""
        return len(self.logits[0]) if len(self.logits) else 0

    def threshold(self, target: float) -> float:
        """The threshold at which the keep ratio over the prompts comes closest to `target` from above.

        One threshold for all prompts and sites: prompts still differ. Raises ConfigError for a target outside (0, 1].
        """
        if not 0 < target <= 1:
            raise ConfigError(f"keep_ratio={target} was given; it must be above 0 and at most 1")
        return self._known_thresholds(target)

    @cached_property
    def _known_thresholds(self) -> Callable[[float], float]:
        return lru_cache(THRESHOLDS)(self._find_threshold)

    def _find_threshold(self, target: float) -> float:
        values = self._values
        low, high = float(values.min()) - 1, float(values.max()) + 1
        for _ in range(40):
            middle = (low + high) / 2
            if self.keep_ratio(middle) >= target - 1e-6:  # a mean in float32 of exactly 0.9 is a little less
                low = middle
            else:
                high = middle
        below = values[values < low - 1e-6]
        # Halfway to the next lower logit: on the edge, rounding in another batch could cost the last unit.
        return (low + float(below.max())) / 2 if len(below) else low - 1

    def keep_ratio(self, threshold: float) -> float:
        """The share of units that the prompts keep at a threshold, a mean over them by their weights."""
        # In the logits' own precision, as the gate will: in a finer one the last unit could fall on the other side.
        gate = Gate(threshold=threshold, bucket=self.bucket, least_kept=self.least_kept)
        kept = keep_ratio(gate.every(self.logits, self.geometries)).double()
        weights = torch.ones_like(kept) if self.weights is None else self.weights.to(kept)
        return float(kept @ weights / weights.sum())

    @cached_property
    def _values(self) -> Tensor:
        return torch.cat([x.flatten() for x in self.logits]).double()


def check_window(window: int | None) -> None:
    """Raise ConfigError for a number of prompt tokens that cannot be."""
    if window is not None:
        check_range("window", window, 1, 2**31 - 1, ", or None for all prompt tokens")


@dataclass(frozen=True, eq=False)
class Pruner:
    """A policy, the gate that turns its logits into decisions, what it measures, and what pruned units leave behind.

    window: entropy over the last so many prompt tokens, None for all. fill: what a pruned head leaves behind, `zero` or
    `mean` (its mean output over this prompt). units: the kinds that are decided about, see `microglia.units`.
    budget: what turns a keep ratio into a threshold, see `at`; it counts as the gate does. recovery: what else changes
    in the model while it writes with the kept units.
    """

    policy: Policy
    gate: Gate = Gate()
    window: int | None = 64
    fill: Fill = "zero"
    units: tuple[str, ...] = ("head",)
    budget: Budget | None = None
    recovery: Recovery | None = None

    def __post_init__(self) -> None:
        check_choice("fill", self.fill, get_args(Fill))
        check_window(self.window)
        bucket, least = self.gate.bucket, self.gate.least_kept
        if self.budget is not None and (self.budget.bucket, self.budget.least_kept) != (bucket, least):
            # Of a gate that was replaced.
            object.__setattr__(self, "budget", replace(self.budget, bucket=bucket, least_kept=least))
        for unit in self.units:
            _ = UNITS[unit]
        for name in self.policy.signals:
            if (unit := SIGNALS[name].unit) not in self.units:
                raise ConfigError(
                    f"signals={name!r} is measured at units={unit!r}, but units={','.join(self.units)!r} are decided "
                    "about; decide about those too or leave the signal out"
                )

    @property
    def signals(self) -> list[Signal]:
        """What is measured while a prompt is read."""
        means: list[Signal] = [MeanOutput()] if self.fill == "mean" else []
        return [SIGNALS[name] for name in self.policy.signals] + means

    def at(self, keep_ratio: float | None) -> "Pruner":
        """This pruner at another budget: so many units are kept on average, prompts still differ. None: unchanged.

        Raises ConfigError where there are no prompts to calibrate a keep ratio on.
        """
        if keep_ratio is None:
            return self
        if self.budget is None or not self.budget.prompts:
            raise ConfigError(
                f"keep_ratio={keep_ratio} was given, but there are no prompts to calibrate it on; train first or give "
                "set_keep_ratio some"
            )
        return self.with_threshold(self.budget.threshold(keep_ratio))

    def with_threshold(self, threshold: float) -> "Pruner":
        """This pruner with another threshold."""
        return replace(self, gate=replace(self.gate, threshold=threshold))

    def with_budget(
        self, logits: Sequence[Tensor], geometries: Sequence[Geometry], weights: Tensor | None = None
    ) -> "Pruner":
        """This pruner with calibration logits (N, U) per site, and weights (N,) of the prompts as in Budget."""
        return replace(self, budget=Budget(logits, geometries, self.gate.bucket, weights, self.gate.least_kept))

    def keep(self, logits: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
        """Logits (B, U) per site → keep (B, U) per site."""
        return self.gate.every(logits, geometries)

    def fingerprint(self) -> str:
        """Equal for pruners that decide and write alike, and for no others."""
        gate = {name: value for name, value in asdict(self.gate).items() if name != "rows"}
        recovery = f" {self.recovery.fingerprint()}" if self.recovery is not None else ""
        return f"{self.policy.fingerprint()} {gate} {self.window} {self.fill} {self.units}{recovery}"
