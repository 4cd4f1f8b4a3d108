"""How sure a measured proportion, mean, difference or rank correlation is.

Proportions: Wilson 1927. Means and paired differences: the BCa bootstrap (Efron 1987). Two systems on the same
examples: the exact form of McNemar's test (1947). Samples that never vary tell a bootstrap nothing (it would answer
with an interval of width zero), so for 0/1 data they get exact bounds after Clopper and Pearson (1934) instead.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from microglia.errors import ConfigError, DataError

Floats = NDArray[np.float64]
BATCH = 500  # resamples held at once: 500 by 1,319 examples of GSM8K are 5 MB, not 100


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over n pairs. `discordant` pairs differ; `method` is BCa, percentile, exact or undefined."""

    diff: float
    ci95: tuple[float, float]
    n: int
    discordant: int
    method: str


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of n pairs with its bootstrap percentile interval."""

    rho: float
    ci95: tuple[float, float]
    n: int


def bootstrap_ci(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval for the mean of `values` (n,), BCa bootstrap; the same arguments give the same interval.

    When all values are equal: the exact Clopper-Pearson interval if they are 0s or 1s, otherwise (nan, nan), because
    nothing is known about how they vary. Raises DataError for no values, ConfigError for a confidence outside (0, 1).
    """
    x = _vector(values, "values")
    _check_confidence(confidence)
    if np.ptp(x) > 0:
        return _bootstrap_mean(x, confidence, resamples, seed)[0]
    if x[0] not in (0.0, 1.0):
        return math.nan, math.nan
    exact = stats.binomtest(int(x.sum()), x.size).proportion_ci(confidence, method="exact")
    return float(exact.low), float(exact.high)


def paired_difference(a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> PairedDifference:
    """Mean of a - b, both (n,) and measured on the same examples in the same order, with its 95 % interval.

    The pairs are resampled together (BCa; percentile where BCa is undefined). When a - b is the same for every pair
    and both are 0/1, the interval is exact (see `_constant_difference`); for other values it is (nan, nan), method
    "undefined". With fewer than some ten discordant pairs a bootstrap is too narrow: read `mcnemar_exact` beside it.
    Raises DataError for empty or unequally long samples.
    """
    x, y = _pair(a, b)
    difference = x - y
    discordant = int(np.count_nonzero(difference))
    diff = float(difference.mean())
    if np.ptp(difference) > 0:
        interval, method = _bootstrap_mean(difference, 0.95, resamples, seed)
    elif zero_one(x, y):
        interval, method = _constant_difference(difference[0], x.size), "exact"
    else:
        interval, method = (math.nan, math.nan), "undefined"
    return PairedDifference(diff, interval, x.size, discordant, method)


def clustered_ci(
    numerators: ArrayLike, denominators: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators, both (n,): a mean per token of n prompts, say.

    Prompts are resampled with all their tokens, as the tokens of one text go together (percentile bootstrap). (nan,
    nan) where every resample would be the same. Raises DataError for unequally long samples.
    """
    x, y = _pair(numerators, denominators)
    if x.size < 2 or np.ptp(x * y.sum() - y * x.sum()) == 0:
        return math.nan, math.nan
    low, high = np.quantile(_resampled_ratios(x, y, resamples, seed), (0.025, 0.975))
    return float(low), float(high)


def _resampled_ratios(x: Floats, y: Floats, resamples: int, seed: int) -> Floats:
    rng, n, parts = np.random.default_rng(seed), x.size, list[Floats]()
    for start in range(0, resamples, BATCH):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(BATCH, resamples - start))
        parts.append((counts @ x) / np.maximum(counts @ y, 1e-12))
    return np.concatenate(parts)


def mcnemar_exact(a_correct: ArrayLike, b_correct: ArrayLike) -> float:
    """Two-sided p-value that a and b, (n,) of 0/1 on the same examples, are right equally often.

    Only discordant pairs count: under the null each falls to either side like a coin. 1.0 when there is none.
    Raises DataError for empty or unequally long samples or values other than 0 and 1.
    """
    a, b = _pair(a_correct, b_correct)
    if not zero_one(a, b):
        raise DataError("the outcomes hold values other than 0 and 1; give one right (1) or wrong (0) per example")
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def wilson_ci(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval for a proportion. Raises DataError unless 0 ≤ successes ≤ n and n ≥ 1."""
    _check_confidence(confidence)
    if not (n >= 1 and 0 <= successes <= n):
        raise DataError(f"{successes} successes of {n} make no proportion; give 0 ≤ successes ≤ n and n of at least 1")
    wilson = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    return float(wilson.low), float(wilson.high)


def spearman_ci(a: ArrayLike, b: ArrayLike, *, resamples: int = 2_000, seed: int = 0) -> RankCorrelation:
    """Spearman's rank correlation of a and b, both (n,), ties sharing their mean rank, with a 95 % interval.

    Pairs are resampled and ranked anew; the interval is the percentile one, without resamples in which a or b does not
    vary. At |rho| = 1 it has no width: then it only says that no resample breaks the order, not that none could.
    Raises DataError for fewer than 3 pairs or a sample that never varies.
    """
    x, y = _pair(a, b)
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DataError(
            f"no rank correlation in {x.size} pairs of {np.unique(x).size} and {np.unique(y).size} different values; "
            "give at least 3 pairs in which both vary"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resamples that do not vary
        resampled = _bootstrap((x, y), _rank_correlation, "percentile", 0.95, resamples, seed).bootstrap_distribution
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return RankCorrelation(float(_rank_correlation(x, y)), (float(low), float(high)), x.size)


def _bootstrap(
    samples: tuple[Floats, ...], statistic: Any, method: str, confidence: float, resamples: int, seed: int
) -> Any:
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"confidence_level": confidence, "n_resamples": resamples, "batch": BATCH, "rng": rng}
    return stats.bootstrap(samples, statistic, method=method, paired=True, vectorized=True, **options)


def _bootstrap_mean(x: Floats, confidence: float, resamples: int, seed: int) -> tuple[tuple[float, float], str]:
    """Interval and method: BCa, or percentile where the bias correction is undefined (every resample on one side)."""
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of the very case that the next method is for
            interval = _bootstrap((x,), np.mean, method, confidence, resamples, seed).confidence_interval
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            break
    return (float(interval.low), float(interval.high)), method


def _constant_difference(difference: float, n: int) -> tuple[float, float]:
    """95 % interval of a mean difference of 0/1 outcomes when all n pairs agree on it (-1, 0 or 1).

    A share s = 0.05^(1/n) of all pairs at least falls on the side seen n times in n (one-sided Clopper-Pearson). The
    rest, 1 - s, could differ by one step up or down from 0 and by up to two from ±1:
    0 → (s - 1, 1 - s), about ±3/n; 1 → (2s - 1, 1); -1 → (-1, 1 - 2s).
    """
    share = float(stats.binomtest(n, n, alternative="greater").proportion_ci(0.95, method="exact").low)
    if difference == 0:
        return share - 1, 1 - share
    return (2 * share - 1, 1.0) if difference > 0 else (-1.0, 1 - 2 * share)


def _rank_correlation(x: Floats, y: Floats, axis: int = -1) -> Any:
    """Spearman's rho along `axis`; nan where one of both does not vary."""
    return stats.pearsonr(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis=axis).statistic


def finite_array(values: Any, dimensions: int, name: str, requirement: str) -> Floats:
    """The values as float64. Raises DataError for another number of dimensions, for none and for NaN or infinity."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != dimensions or not x.size or not np.isfinite(x).all():
        raise DataError(f"{name} have the shape {x.shape}; give {requirement}")
    return x


def zero_one(*samples: Floats) -> bool:
    """Whether all values are outcomes, 0 or 1."""
    return all(bool(np.isin(sample, (0.0, 1.0)).all()) for sample in samples)


def _vector(values: ArrayLike, name: str) -> Floats:
    return finite_array(values, 1, name, "a flat, non-empty list of finite numbers")


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _vector(a, "the first sample's values"), _vector(b, "the second sample's values")
    if x.size != y.size:
        raise DataError(f"the samples have {x.size} and {y.size} values; give both on the same examples, in one order")
    return x, y


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence} but must lie between 0 and 1; 0.95 is usual")
