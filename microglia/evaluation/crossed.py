"""Means and differences over prompts and seeds at once: values (S, N) of S seeds on the same N prompts.

Intervals: the pigeonhole bootstrap (Owen 2007), which resamples seeds and prompts independently, so that what varies
from training to training counts beside what varies from prompt to prompt. With a handful of seeds it is still somewhat
too narrow in that direction. Tests: of several trainings that differ, a t-test over seeds whose variance is that of the
seeds' means plus that of the prompts' means, so that neither other seeds nor other prompts are taken for granted; of
one, or where all agree, McNemar's or flips of the prompts' signs. Several tests at once: Holm (1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from microglia.errors import DataError
from microglia.evaluation.significance import (
    BATCH,
    bootstrap_ci,
    finite_array,
    mcnemar_exact,
    paired_difference,
    zero_one,
)
from microglia.results import Difference

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]


def crossed_mean(values: ArrayLike, *, resamples: int = 2_000, seed: int = 0) -> Mean:
    """Mean of (S, N) values. One seed alone, or seeds that all agree, leave the prompts' own interval."""
    x = _table(values, "the values")
    if bool((x == x[:1]).all()):
        return Mean(float(x[0].mean()), bootstrap_ci(x[0], resamples=resamples, seed=seed))
    return Mean(float(x.mean()), _pigeonhole(x, resamples, seed))


def crossed_difference(a: ArrayLike, b: ArrayLike, *, resamples: int = 2_000, seed: int = 0) -> Difference:
    """Mean of a - b, (S, N) each, paired by seed, or (1, N) for what depends on no seed.

    Raises DataError for other prompts.
    """
    x, y = _table(a, "the first values"), _table(b, "the second values")
    if x.shape[1] != y.shape[1] or (len(x) != len(y) and 1 not in (len(x), len(y))):
        raise DataError(f"values of the shapes {x.shape} and {y.shape} cannot be paired; give (seeds, prompts) of both")
    difference = x - y
    if bool((difference == difference[:1]).all()):
        paired = paired_difference(x[0], y[0], resamples=resamples, seed=seed)
        p_value = mcnemar_exact(x[0], y[0]) if zero_one(x[0], y[0]) else sign_flip(difference[0], seed=seed)
        return Difference(paired.diff, paired.ci95, p_value)
    return Difference(float(difference.mean()), _pigeonhole(difference, resamples, seed), _t_test(difference))


def _t_test(x: Floats) -> float:
    """Two-sided p-value that the mean of (S, N) differences is 0, for other seeds and prompts too; S is 2 or more.

    What is left of the seeds in the prompts' means, and the other way round, counts twice: to the safe side.
    """
    seeds, prompts = x.shape
    of_seeds = float(x.mean(1).var(ddof=1)) / seeds
    of_prompts = float(x.mean(0).var(ddof=1)) / prompts if prompts > 1 else 0.0
    variance = max(of_seeds + of_prompts, float(x.var(ddof=1)) / x.size)  # never less than if all were independent
    return float(2 * stats.t.sf(abs(x.mean()) / variance**0.5, seeds - 1))


def sign_flip(differences: ArrayLike, *, flips: int = 9_999, seed: int = 0) -> float:
    """Two-sided p-value that paired differences (N,) are as likely to be positive as negative (Fisher 1935).

    By random flips, so never below 1 / (flips + 1).
    """
    x = _table([differences], "the differences")[0]
    x = x[x != 0]
    rng = np.random.default_rng(seed)
    as_extreme, observed = 1, abs(x.sum()) - 1e-9
    for start in range(0, flips, BATCH):
        signs = rng.integers(0, 2, (min(BATCH, flips - start), x.size)) * 2 - 1
        as_extreme += int((np.abs(signs @ x) >= observed).sum())
    return as_extreme / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made all these tests at once: below 0.05 still means so, for any of them."""
    order = np.argsort(p_values)
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_corrected(tests: Sequence[Difference]) -> list[Difference]:
    """The same tests, each with its p-value adjusted for all of them."""
    return [replace(test, p_holm=p) for test, p in zip(tests, holm([t.p_value for t in tests]), strict=True)]


def _pigeonhole(x: Floats, resamples: int, seed: int) -> tuple[float, float]:
    seeds, prompts = x.shape
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, BATCH):
        size = min(BATCH, resamples - start)
        seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size)
        means.append(((seed_counts @ x) * prompt_counts).sum(1) / (seeds * prompts))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _table(values: Any, name: str) -> Floats:
    return finite_array(values, 2, name, "finite numbers for (seeds, prompts), at least one each")
