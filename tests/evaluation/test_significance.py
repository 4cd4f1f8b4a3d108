"""Intervals and p-values against hand-computed numbers, brute force and the equations that define them."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from microglia.errors import ConfigError, DataError
from microglia.evaluation.significance import (
    bootstrap_ci,
    clustered_ci,
    mcnemar_exact,
    paired_difference,
    spearman_ci,
    wilson_ci,
)

Z = statistics.NormalDist().inv_cdf(0.975)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


# --- proportions -----------------------------------------------------------------------------------------------------


def test_wilson_agrees_with_newcombe_1998() -> None:
    """Table I of Statistics in Medicine 17:857, method 3."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_ci(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_where_the_score_test_rejects(counts: tuple[int, int]) -> None:
    successes, n = counts
    share = successes / n
    low, high = wilson_ci(successes, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{successes} successes of {n} make no proportion"):
        wilson_ci(successes, n)


# --- McNemar ---------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    """1 against 9 discordant pairs: 2 · (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024; concordant pairs do not count."""
    a = [1] * 1 + [0] * 9 + [1] * 40 + [0] * 13
    b = [0] * 1 + [1] * 9 + [1] * 40 + [0] * 13
    assert mcnemar_exact(a, b) == pytest.approx(22 / 1024)
    assert mcnemar_exact(a, a) == 1.0
    assert mcnemar_exact(np.array([True, False]), np.array([False, True])) == 1.0


@given(outcomes)
def test_mcnemar_is_the_sum_over_all_coin_tosses(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    only_a = sum(x > y for x, y in pairs)
    n = only_a + sum(x < y for x, y in pairs)
    distance = abs(only_a - n / 2)
    brute = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= distance) / 2**n
    assert mcnemar_exact(a, b) == pytest.approx(brute)
    assert mcnemar_exact(b, a) == pytest.approx(brute)


def test_mcnemar_refuses_what_is_not_right_or_wrong() -> None:
    with pytest.raises(DataError, match="other than 0 and 1"):
        mcnemar_exact([0.5, 1], [0, 1])


# --- means and paired differences ------------------------------------------------------------------------------------


def every_mean(values: list[float]) -> list[float]:
    """The means of all n^n resamples: the bootstrap distribution itself, without drawing."""
    return [sum(resample) / len(values) for resample in itertools.product(values, repeat=len(values))]


def test_the_bootstrap_comes_near_its_exact_distribution() -> None:
    """For symmetric values BCa has nothing to correct, so it is the percentile interval of all 6^6 resamples."""
    values = [-5.0, -3.0, -1.0, 1.0, 3.0, 5.0]
    assert bootstrap_ci(values) == pytest.approx(tuple(np.quantile(every_mean(values), (0.025, 0.975))), abs=0.17)


def test_a_large_sample_has_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(7, 2, 2000)
    error = values.std(ddof=1) / math.sqrt(values.size)
    low, high = bootstrap_ci(values, resamples=4000)
    assert low == pytest.approx(values.mean() - Z * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + Z * error, abs=0.1 * error)
    narrow = bootstrap_ci(values, confidence=0.5, resamples=4000)
    assert (narrow[1] - narrow[0]) / 2 == pytest.approx(statistics.NormalDist().inv_cdf(0.75) * error, rel=0.1)


def test_bca_leans_to_the_long_tail() -> None:
    """A right-skewed sample: BCa reaches further up than down, beyond what percentiles of the resamples do."""
    values = np.random.default_rng(0).exponential(1.0, 40)
    low, high = bootstrap_ci(values)
    percentile = np.quantile(np.random.default_rng(3).choice(values, (10_000, 40)).mean(1), (0.025, 0.975))
    assert low > percentile[0]
    assert high > percentile[1]


def test_the_seed_decides() -> None:
    values = np.random.default_rng(2).random(30)
    assert bootstrap_ci(values, seed=1, resamples=500) == bootstrap_ci(values, seed=1, resamples=500)
    assert bootstrap_ci(values, seed=1, resamples=500) != bootstrap_ci(values, seed=2, resamples=500)


def test_all_right_or_all_wrong_gets_the_exact_interval() -> None:
    """Clopper-Pearson for 0 of n: (0, 1 - 0.025^(1/n))."""
    assert bootstrap_ci([0] * 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert bootstrap_ci([1] * 10) == pytest.approx((0.025**0.1, 1))
    assert all(map(math.isnan, bootstrap_ci([3.5] * 10)))


def test_a_paired_difference_by_hand() -> None:
    a = [1, 1, 1, 1, 0, 0, 1, 1, 1, 0] * 20
    b = [1, 1, 0, 1, 0, 1, 1, 0, 1, 0] * 20
    result = paired_difference(a, b)
    assert result.diff == pytest.approx(0.1)
    assert (result.n, result.discordant, result.method) == (200, 60, "BCa")
    error = statistics.pstdev([x - y for x, y in zip(a, b, strict=True)]) / math.sqrt(200)
    assert result.ci95 == pytest.approx((0.1 - Z * error, 0.1 + Z * error), abs=0.15 * error)


def test_pairing_takes_out_what_both_share() -> None:
    difficulty = np.random.default_rng(0).normal(0, 10, 100)
    noise = np.random.default_rng(1).normal(0, 0.1, 100)
    low, high = paired_difference(difficulty + 1 + noise, difficulty, resamples=1000).ci95
    assert 0.9 < low < high < 1.1


@settings(max_examples=30)
@given(outcomes)
def test_an_interval_of_outcomes_has_width_and_holds_the_difference(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    result, mirrored = paired_difference(a, b, resamples=300), paired_difference(b, a, resamples=300)
    assert result.diff == pytest.approx(sum(a) / len(a) - sum(b) / len(b), abs=1e-12)
    assert mirrored.diff == pytest.approx(-result.diff, abs=1e-12)
    assert -1 <= result.ci95[0] < result.ci95[1] <= 1
    assert result.ci95[0] <= result.diff + 1e-12
    assert result.ci95[1] >= result.diff - 1e-12


def test_no_discordant_pair_gets_a_bound_of_about_three_in_n() -> None:
    result = paired_difference([1, 0] * 50, [1, 0] * 50)
    bound = 1 - 0.05 ** (1 / 100)
    assert (result.diff, result.discordant, result.method) == (0.0, 0, "exact")
    assert result.ci95 == pytest.approx((-bound, bound))
    assert bound == pytest.approx(0.03, abs=0.001)


def test_the_exact_bound_covers_at_the_worst_rate() -> None:
    """At the rate of discordant pairs on the bound, no discordant pair at all is observed in just 5 % of samples."""
    bound = paired_difference([1] * 37, [1] * 37).ci95[1]
    assert stats.binom.pmf(0, 37, bound) == pytest.approx(0.05)


def test_every_pair_discordant_on_one_side() -> None:
    share = 0.05 ** (1 / 20)
    assert paired_difference([1] * 20, [0] * 20).ci95 == pytest.approx((2 * share - 1, 1))
    assert paired_difference([0] * 20, [1] * 20).ci95 == pytest.approx((-1, 1 - 2 * share))


def test_a_constant_difference_of_measurements_is_not_made_certain() -> None:
    result = paired_difference([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (result.diff, result.method) == (0.5, "undefined")
    assert all(map(math.isnan, result.ci95))


# --- rank correlation ------------------------------------------------------------------------------------------------


def test_spearman_by_hand() -> None:
    """1 - 6 Σd² / (n (n² - 1)) with d = (0, 1, -1, 0, 0): 1 - 12 / 120."""
    assert spearman_ci([1, 2, 3, 4, 5], [10, 30, 20, 40, 50], resamples=200).rho == pytest.approx(0.9)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40))
def test_spearman_with_ties_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    if len({*a}) == 1 or len({*b}) == 1:
        with pytest.raises(DataError, match="in which both vary"):
            spearman_ci(a, b)
        return
    result = spearman_ci(a, b, resamples=100)
    assert result.rho == pytest.approx(stats.spearmanr(a, b).statistic)
    assert -1 - 1e-12 <= result.ci95[0] <= result.ci95[1] <= 1 + 1e-12


def test_the_interval_of_spearman_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    a = rng.integers(1, 9, 80)
    b = a + rng.normal(0, 3, 80)
    loop = []
    for _ in range(1000):
        chosen = rng.integers(0, 80, 80)
        loop.append(stats.spearmanr(a[chosen], b[chosen]).statistic)
    result = spearman_ci(a, b)
    assert result.ci95 == pytest.approx(tuple(np.quantile(loop, (0.025, 0.975))), abs=0.03)
    assert result.ci95[0] < result.rho < result.ci95[1]
    assert result.n == 80


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_samples_are_refused() -> None:
    with pytest.raises(DataError, match="flat, non-empty list"):
        bootstrap_ci([])
    with pytest.raises(DataError, match="finite numbers"):
        bootstrap_ci([1.0, math.nan])
    with pytest.raises(ConfigError, match=r"confidence is 95"):
        bootstrap_ci([1, 2], confidence=95)
    for compare in (paired_difference, mcnemar_exact, spearman_ci):
        with pytest.raises(DataError, match="3 and 2 values"):
            compare([1, 0, 1], [1, 0])


def test_an_interval_per_token_resamples_prompts_with_all_their_tokens() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 60, 80)
    values = tokens * rng.gamma(2, 0.05, 80)  # the tokens of one prompt go together
    low, high = clustered_ci(values, tokens)
    ratios = []
    for _ in range(4000):
        picked = rng.integers(0, 80, 80)
        ratios.append(values[picked].sum() / tokens[picked].sum())
    assert (low, high) == pytest.approx(np.quantile(ratios, (0.025, 0.975)), abs=0.002)
    assert low < values.sum() / tokens.sum() < high
    assert clustered_ci(values, tokens) == (low, high)
    assert all(math.isnan(end) for end in clustered_ci(tokens * 0.5, tokens))
    assert all(math.isnan(end) for end in clustered_ci([1.0], [2.0]))
    with pytest.raises(DataError, match="the samples have 2 and 1 values"):
        clustered_ci([1, 2], [3])
