"""The one value that is trained, saved, loaded, served, compared and attached: who decides, and by which rules."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from microglia.errors import ConfigError, check_choice, check_range
from microglia.gate import Gate, keep_ratio
from microglia.policies import Policy
from microglia.recovery import Recovery
from microglia.signals import MEANS, SIGNALS, Signal
from microglia.units import UNITS, Arrangement, Geometry, Site, StepCosts, find_sites

Fill = Literal["zero", "mean"]
THRESHOLDS = 1024  # that a budget remembers; each takes forty passes over its logits to find


@dataclass(frozen=True, eq=False)
class Budget:
    """From a keep ratio, or a share of a step's bytes, to a threshold: a policy's logits on calibration prompts.

    logits: (N, U) per site for N prompts that should be like those to come and unlike those that trained the policy.
    bucket, least_kept: of the gate. weights: (N,), what each prompt counts for, the tokens of its answer, since time is
    spent per token; None where all count alike. costs: what the units of the model cost; see `units.step_costs`.
    """

    logits: Sequence[Tensor]
    geometries: Sequence[Geometry]
    bucket: int | None = None
    weights: Tensor | None = None
    least_kept: float = 0.0
    costs: StepCosts | None = None

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
        return self._known_thresholds(target, False)

    def threshold_for_bytes(self, target: float) -> float:
        """The threshold at which the prompts read the share `target` of a dense step's bytes, on average.

        Raises ConfigError without costs, and for a target outside of what can be reached.
        """
        if self.costs is None:
            raise ConfigError(
                f"bytes={target} was given, but what the model's units cost is not known here; give the budget costs, "
                "units.step_costs(model, sites)"
            )
        least = self.byte_share(float("inf"))
        if not least - 1e-6 <= target <= 1:
            raise ConfigError(
                f"bytes={target} was given; a step reads at most 1 and at least {least:.3f} of the dense one's bytes "
                "when only what cannot go is kept"
            )
        return self._known_thresholds(target, True)

    @cached_property
    def _known_thresholds(self) -> Callable[[float, bool], float]:
        return lru_cache(THRESHOLDS)(self._find_threshold)

    def _find_threshold(self, target: float, in_bytes: bool) -> float:
        values, share = self._values, self.byte_share if in_bytes else self.keep_ratio
        low, high = float(values.min()) - 1, float(values.max()) + 1
        for _ in range(40):
            middle = (low + high) / 2
            if share(middle) >= target - 1e-6:  # a mean in float32 of exactly 0.9 is a little less
                low = middle
            else:
                high = middle
        below = values[values < low - 1e-6]
        # Halfway to the next lower logit: on the edge, rounding in another batch could cost the last unit.
        return (low + float(below.max())) / 2 if len(below) else low - 1

    def keep_ratio(self, threshold: float) -> float:
        """The share of units that the prompts keep at a threshold, a mean over them by their weights."""
        return self._mean(keep_ratio(self._keep(threshold)))

    def byte_share(self, threshold: float) -> float:
        """The share of a dense step's bytes that the prompts read at a threshold, a mean over them by their weights."""
        assert self.costs is not None
        return self._mean(self.costs.share(self._keep(threshold)))

    def _keep(self, threshold: float) -> list[Tensor]:
        # In the logits' own precision, as the gate will: in a finer one the last unit could fall on the other side.
        gate = Gate(threshold=threshold, bucket=self.bucket, least_kept=self.least_kept)
        return gate.every(self.logits, self.geometries)

    def _mean(self, of_prompts: Tensor) -> float:
        values = of_prompts.double()
        weights = torch.ones_like(values) if self.weights is None else self.weights.to(values)
        return float(values @ weights / weights.sum())

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
    in the model while it writes with the kept units. arrangement: the blocks that channels go in, and which units
    always stay.
    """

    policy: Policy
    gate: Gate = Gate()
    window: int | None = 64
    fill: Fill = "zero"
    units: tuple[str, ...] = ("head",)
    budget: Budget | None = None
    recovery: Recovery | None = None
    arrangement: Arrangement = Arrangement()

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
        means = [mean for mean in MEANS if self.fill == "mean" and mean.unit in self.units]
        return [*(SIGNALS[name] for name in self.policy.signals), *means]

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """The sites of a model that this pruner decides about."""
        return find_sites(model, self.units, self.arrangement)

    def at(self, keep_ratio: float | None = None, *, byte_share: float | None = None) -> "Pruner":
        """This pruner at another budget; prompts still differ. Without any: unchanged.

        keep_ratio: so many units are kept on average. byte_share: so much of the bytes of a dense step is read.
        Raises ConfigError for both at once, and where there are no prompts to calibrate them on.
        """
        if keep_ratio is None and byte_share is None:
            return self
        given = f"keep_ratio={keep_ratio}" if byte_share is None else f"bytes={byte_share}"
        if keep_ratio is not None and byte_share is not None:
            raise ConfigError(f"{given} was given beside keep_ratio={keep_ratio}; a budget is one of them")
        if self.budget is None or not self.budget.prompts:
            raise ConfigError(
                f"{given} was given, but there are no prompts to calibrate it on; train first or give "
                "set_keep_ratio some"
            )
        if byte_share is not None:
            return self.with_threshold(self.budget.threshold_for_bytes(byte_share))
        assert keep_ratio is not None
        return self.with_threshold(self.budget.threshold(keep_ratio))

    def with_threshold(self, threshold: float) -> "Pruner":
        """This pruner with another threshold."""
        return replace(self, gate=replace(self.gate, threshold=threshold))

    def with_budget(
        self,
        logits: Sequence[Tensor],
        geometries: Sequence[Geometry],
        weights: Tensor | None = None,
        *,
        costs: StepCosts | None = None,
    ) -> "Pruner":
        """This pruner with calibration logits (N, U) per site, weights (N,) of the prompts and costs as in Budget."""
        budget = Budget(logits, geometries, self.gate.bucket, weights, self.gate.least_kept, costs)
        return replace(self, budget=budget)

    def with_costs(self, costs: StepCosts) -> "Pruner":
        """This pruner with a budget, if it has one, that is counted in these bytes."""
        return self if self.budget is None else replace(self, budget=replace(self.budget, costs=costs))

    def keep(self, logits: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
        """Logits (B, U) per site → keep (B, U) per site."""
        return self.gate.every(logits, geometries)

    def fingerprint(self) -> str:
        """Equal for pruners that decide and write alike, and for no others."""
        gate = {name: value for name, value in asdict(self.gate).items() if name != "rows"}
        parts = [self.policy.fingerprint(), gate, self.window, self.fill, self.units]
        if self.recovery is not None:
            parts.append(self.recovery.fingerprint())
        if self.units != ("head",):
            parts.append(self.arrangement.fingerprint())
        return " ".join(map(str, parts))
