"""Time on a machine that is never quiet: variants take turns, and are compared within the same turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """Milliseconds that work takes on a device: CUDA events on a GPU, the monotonic clock elsewhere."""

    device: torch.device

    def __call__(self, work: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.device)  # nothing of the variant before may still be queued
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        self._wait()
        began = perf_counter_ns()
        work()
        self._wait()
        return (perf_counter_ns() - began) / 1e6

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def interleaved(variants: Mapping[str, Callable[[], T]], repetitions: int, *, warm_up: int = 1) -> dict[str, list[T]]:
    """Let every variant measure itself once per repetition; what they return, in the order of repetitions.

    A neighbour's load that lasts longer than one repetition meets all variants alike. Each repetition begins with
    another variant, so that none profits from its place. `warm_up` repetitions are thrown away.
    """
    names = list(variants)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for repetition in range(-warm_up, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            sample = variants[name]()
            if repetition >= 0:
                samples[name].append(sample)
    return samples


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile of n measurements."""

    median: float
    p20: float
    p80: float
    n: int


def summary(samples: Sequence[float]) -> Summary:
    """The summary of at least one measurement."""
    p20, median, p80 = np.percentile(samples, (20, 50, 80))
    return Summary(float(median), float(p20), float(p80), len(samples))


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its 95 % bootstrap interval."""

    median: float
    ci95: tuple[float, float]


def paired_ratio(over: Sequence[float], under: Sequence[float], *, resamples: int = 2_000, seed: int = 0) -> Ratio:
    """over[i] ÷ under[i], both measured in repetition i; the pairs are resampled (percentile bootstrap)."""
    ratios = np.asarray(over, dtype=float) / np.asarray(under, dtype=float)
    drawn = np.random.default_rng(seed).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), (float(low), float(high)))
