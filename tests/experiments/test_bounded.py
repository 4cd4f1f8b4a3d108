"""The limit of a bounded mean: simulated worlds whose truth is known, a slow truth, and blunter bounds beside it."""

import math

import numpy as np
import pytest
from scipy import stats

from microglia.errors import ConfigError, DataError
from microglia.experiments.bounded import losses_needed, mean_limit, mean_p_value

PROMPTS = 150


def slowly(losses, mean, error) -> float:
    """The same game, prompt by prompt."""
    capital = best = 1.0
    total, spread, seen, variance = 0.5, 0.25, 1, 0.25
    for x in losses:
        stake = min(1.0, math.sqrt(2 * math.log(1 / error) / (len(losses) * variance)))
        capital *= 1 + stake * (mean - x)
        best = max(best, capital)
        total, seen = total + x, seen + 1
        spread += (x - total / seen) ** 2
        variance = spread / seen
    return 1 / best


def beta(mean: float, deviation: float, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    scale = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * scale, (1 - mean) * scale, size)


# Losses (W, N) of many worlds whose mean is exactly that of the limit which must not be missed.
WORLDS = {
    "a coin": lambda rng, size: (rng.uniform(size=size) < 0.05).astype(float),
    "shares of twenty tokens": lambda rng, size: rng.binomial(20, 0.05, size) / 20,
    "hardly any spread": lambda rng, size: beta(0.05, 0.01, rng, size),
    "much spread": lambda rng, size: beta(0.05, 0.15, rng, size),
    "rarely everything": lambda rng, size: np.where(rng.uniform(size=size) < 0.02, 1.0, 0.03 / 0.98),
    "always the same": lambda rng, size: np.full(size, 0.05 + 1e-12),
}


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("kind", list(WORLDS))
def test_the_limit_is_missed_no_more_often_than_said(kind: str, confidence: float) -> None:
    """Of 2,000 worlds; of a method that misses exactly as often as it may, 1 run in 1,000 would show more."""
    many, error = 2000, 1 - confidence
    losses = WORLDS[kind](np.random.default_rng(sum(map(ord, kind))), (many, PROMPTS))
    missed = sum(mean_p_value(row, 0.05, confidence) <= error for row in losses)
    assert missed <= stats.binom.isf(0.001, many, error)
    if kind in ("much spread", "a coin") and confidence == 0.8:
        assert missed >= 0.01 * many  # valid, and not by being blunt


def test_worlds_catch_a_bound_that_promises_too_much() -> None:
    """A normal approximation from the sample's own spread misses a rare large loss."""
    losses = WORLDS["rarely everything"](np.random.default_rng(0), (2000, PROMPTS))
    wald = losses.mean(1) + stats.norm.ppf(0.95) * losses.std(1, ddof=1) / math.sqrt(PROMPTS)
    assert (wald < 0.05).mean() > 0.1


def test_the_p_value_is_that_of_the_game_played_slowly() -> None:
    rng = np.random.default_rng(1)
    for mean, confidence in ((0.05, 0.95), (0.3, 0.8), (0.9, 0.99)):
        losses = rng.uniform(size=80) ** 3
        assert mean_p_value(losses, mean, confidence) == pytest.approx(
            min(1, slowly(losses, mean, 1 - confidence)), rel=1e-9
        )


def test_the_limit_is_where_the_p_value_crosses_and_follows_the_losses() -> None:
    losses = beta(0.03, 0.03, np.random.default_rng(2), (1, 200))[0]
    limit = mean_limit(losses)
    assert mean_p_value(losses, limit) <= 0.05 < mean_p_value(losses, limit - 1e-4)
    assert losses.mean() < limit < mean_limit(np.minimum(losses + 0.02, 1))
    assert limit < mean_limit(losses, 0.99)
    assert mean_limit(np.tile(losses, 20)) < losses.mean() + 0.003
    assert mean_limit([1.0, 1.0]) == 1


def test_how_many_prompts_the_first_promise_takes() -> None:
    for mean, confidence in ((0.02, 0.95), (0.05, 0.95), (0.1, 0.8)):
        needed = losses_needed(mean, confidence)
        assert math.log(1 - confidence) / math.log(1 - mean) <= needed <= 1.2 * math.log(1 / (1 - confidence)) / mean
        assert mean_limit(np.zeros(needed), confidence) <= mean + 1e-6 < mean_limit(np.zeros(needed - 1), confidence)


def test_hoeffding_and_bentkus_say_less() -> None:
    """What the module's docstring says: mean .03, deviation .03, 200 prompts, a promise of .05."""

    def blunt(x) -> float:
        m, n = min(x.mean(), 0.05), len(x)
        hoeffding = math.exp(-n * (m * math.log(m / 0.05) + (1 - m) * math.log((1 - m) / 0.95)))
        return min(hoeffding, math.e * float(stats.binom.cdf(math.ceil(n * m), n, 0.05)))

    losses = beta(0.03, 0.03, np.random.default_rng(3), (400, 200))
    assert np.mean([mean_p_value(row, 0.05) <= 0.05 for row in losses]) > 0.93
    assert not any(blunt(row) <= 0.05 for row in losses)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: mean_limit([0.2, 1.2]),
            DataError,
            r"losses from 0.2 to 1.2 were given; they must lie between 0 and 1",
        ),
        (lambda: mean_limit([]), DataError, r"the losses have the shape \(0,\); give at least one number"),
        (lambda: mean_limit([0.1], 1), ConfigError, r"confidence is 1 but must lie between 0 and 1"),
        (lambda: mean_p_value([0.1], 1), ConfigError, r"a mean loss of 1 was given; it must lie between 0 and 1"),
        (lambda: losses_needed(0), ConfigError, r"max_drop=0 was given; it must lie between 0 and 1, and 0.05 is"),
    ],
)
def test_what_cannot_be_is_refused(call, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        call()
