"""The limit of a drop: against full enumeration, against blunter bounds, and on what cannot be."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from microglia.errors import ConfigError, DataError
from microglia.experiments.drop import drop_limit, drop_p_value, prompts_needed


def outcomes(n: int) -> list[tuple[int, int]]:
    """Every (lost, won) of n prompts."""
    return [(lost, won) for lost in range(n + 1) for won in range(n + 1 - lost)]


def probabilities(n: int, p: float, m: float) -> np.ndarray:
    """Of every outcome, by the multinomial's own formula."""
    return stats.multinomial(n, [p, m, 1 - p - m]).pmf([(a, b, n - a - b) for a, b in outcomes(n)])


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.95), (7, 0.8), (20, 0.95)])
def test_the_limit_is_missed_no_more_often_than_said(n: int, confidence: float) -> None:
    """Whatever the truth: a grid of them, by enumeration, tolerating only floating point."""
    limits = np.array([drop_limit(lost, won, n, confidence) for lost, won in outcomes(n)])
    misses = []
    for p, m in itertools.product(np.linspace(0, 1, 26), repeat=2):
        if p + m <= 1:
            misses.append(probabilities(n, p, m)[limits < p - m - 1e-12].sum())
    assert max(misses) <= 1 - confidence + 1e-9
    assert max(misses) > 0.6 * (1 - confidence) or n < 20  # valid, and not by being blunt


def test_the_limit_is_where_the_p_value_crosses() -> None:
    for lost, won, n in ((0, 0, 150), (5, 3, 300), (40, 45, 300), (2, 30, 100)):
        limit = drop_limit(lost, won, n)
        assert drop_p_value(lost, won, n, limit) <= 0.05 < drop_p_value(lost, won, n, limit - 1e-4)


def test_losses_raise_the_limit_and_wins_lower_it() -> None:
    for lost, won in itertools.product((0, 1, 5, 20), repeat=2):
        here = drop_limit(lost, won, 200)
        assert here > (lost - won) / 200
        assert drop_limit(lost + 1, won, 200) > here
        assert drop_limit(lost, won + 1, 200) <= here


def test_a_large_sample_agrees_with_the_normal_approximation() -> None:
    lost, won, n = 300, 240, 6000
    mean = (lost - won) / n
    wald = mean + stats.norm.ppf(0.95) * math.sqrt(((lost + won) / n - mean**2) / n)
    assert drop_limit(lost, won, n) == pytest.approx(wald, abs=0.0006)
    assert drop_limit(lost, won, n) > wald


def test_how_many_prompts_the_first_promise_takes() -> None:
    """With no answer changed only (1 - drop)^n counts, the floor of every valid method."""
    for drop, confidence in ((0.02, 0.95), (0.05, 0.95), (0.01, 0.9)):
        floor = math.ceil(math.log(1 - confidence) / math.log(1 - drop))
        assert floor <= prompts_needed(drop, confidence) <= floor + 3
    assert prompts_needed(0.02) == 150
    assert drop_limit(0, 0, 150) <= 0.02 < drop_limit(0, 0, 148)


def test_hoeffding_and_bentkus_need_seventy_times_as_many() -> None:
    """Angelopoulos et al. 2021, on losses mapped to [0, 1]: what the module's docstring says."""

    def p_value(n: int) -> float:
        hoeffding = math.exp(-n * 0.5 * (math.log(0.5 / 0.51) + math.log(0.5 / 0.49)))
        return min(hoeffding, math.e * float(stats.binom.cdf(math.ceil(n * 0.5), n, 0.51)))

    assert p_value(10_996) > 0.05 >= p_value(10_998)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((3, 3, 5), DataError, "3 lost and 3 won answers of 5 cannot be"),
        ((0, 0, 0), DataError, "0 lost and 0 won answers of 0 cannot be"),
        ((-1, 0, 5), DataError, "-1 lost"),
        ((0, 0, 5, 1.0), ConfigError, "confidence is 1.0 but must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        drop_limit(*arguments)


def test_a_drop_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a drop of 2 was given; it must lie between -1 and 1"):
        drop_p_value(0, 0, 5, 2)
    with pytest.raises(ConfigError, match=r"max_drop=0 was given; it must lie between 0 and 1"):
        prompts_needed(0)
