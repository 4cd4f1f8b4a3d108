"""Means and tests over prompts and seeds: by hand, against what one seed gives, and by simulated coverage."""

import numpy as np
import pytest

from microglia.errors import DataError
from microglia.evaluation.crossed import crossed_difference, crossed_mean, holm, sign_flip
from microglia.evaluation.significance import mcnemar_exact, paired_difference

rng = np.random.default_rng(0)
A, B = rng.integers(0, 2, (1, 80)).astype(float), rng.integers(0, 2, (1, 80)).astype(float)


def test_one_seed_is_the_paired_case() -> None:
    result, paired = crossed_difference(A, B, resamples=10_000), paired_difference(A[0], B[0])
    assert (result.diff, result.ci95, result.p_value) == (paired.diff, paired.ci95, mcnemar_exact(A[0], B[0]))
    assert crossed_difference(np.repeat(A, 3, 0), B) == crossed_difference(A, B)  # seeds that agree tell nothing more


def test_what_depends_on_no_seed_is_set_against_every_seed() -> None:
    b = rng.integers(0, 2, (4, 80)).astype(float)
    result = crossed_difference(A, b)
    assert result.diff == pytest.approx(A.mean() - b.mean())
    assert result.ci95[0] < result.diff < result.ci95[1]


def test_seeds_that_differ_widen_the_interval() -> None:
    """The same answers per prompt, but shifted from seed to seed: prompts alone would not show it."""
    same = rng.normal(size=(1, 200)).repeat(4, 0)
    shifted = same + np.array([[-1], [-0.5], [0.5], [1.0]])
    narrow, wide = (np.ptp(crossed_mean(x + rng.normal(size=x.shape) / 100).ci95) for x in (same, shifted))
    assert wide > 3 * narrow


def test_the_interval_covers_what_it_says_it_covers() -> None:
    """200 worlds of 8 seeds by 60 prompts with effects of both; 0.95 would cover 190, and 8 seeds are few."""
    covered = 0
    for world in range(200):
        draw = np.random.default_rng(world)
        x = draw.normal(size=(8, 1)) * 0.3 + draw.normal(size=(1, 60)) + draw.normal(size=(8, 60))
        low, high = crossed_mean(x, resamples=500).ci95
        covered += low <= 0 <= high
    assert 176 <= covered <= 200


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.5])
def test_several_trainings_do_not_reject_a_true_null_too_often(seeds, of_seeds) -> None:
    """400 worlds without a difference; trainings, prompts and answers vary: 5 % would be 20, and of a test that
    rejects in exactly 5 %, 1 run in 1,000 would show more than 34."""
    rejected = 0
    for world in range(400):
        draw = np.random.default_rng(world)
        chances = 0.7 + 0.1 * draw.normal(size=(1, 100))  # of each prompt, the same for both
        right = [draw.random((seeds, 100)) < chances + of_seeds * draw.normal(size=(seeds, 1)) for _ in range(2)]
        rejected += crossed_difference(*np.array(right, dtype=float), resamples=1).p_value < 0.05
    assert rejected <= 34


def test_prompts_that_favour_one_side_are_chance_too() -> None:
    """Trainings agree here, but on other prompts the difference would be another."""
    rejected = 0
    for world in range(400):
        draw = np.random.default_rng(world)
        difference = draw.normal(size=(1, 60)) + 0.1 * draw.normal(size=(4, 60))
        rejected += crossed_difference(difference, np.zeros((4, 60)), resamples=1).p_value < 0.05
    assert rejected <= 34


def test_several_trainings_show_a_difference_that_is_there() -> None:
    draw = np.random.default_rng(0)
    a, b = ((draw.random((5, 300)) < chance).astype(float) for chance in (0.9, 0.8))
    assert crossed_difference(a, b).p_value < 0.01
    assert crossed_difference(np.eye(2), 1 - np.eye(2)).p_value == 1.0  # nothing is left but how answers scatter
    assert crossed_difference(np.eye(2), np.zeros((2, 2))).p_value > 0.05  # whose means all agree


def test_sign_flips_agree_with_mcnemar_and_with_enumeration() -> None:
    difference = np.array([1] * 9 + [-1] + [0] * 30, dtype=float)
    assert sign_flip(difference) == pytest.approx(mcnemar_exact(difference > 0, difference < 0), abs=0.005)
    few = np.array([0.5, 1.0, 0.25])  # of the 8 sign patterns only +++ and --- reach the sum
    assert sign_flip(few) == pytest.approx(2 / 8, abs=0.02)
    assert sign_flip(np.zeros(5)) == 1.0


def test_holm_by_hand() -> None:
    """Smallest times 3, next times 2, largest times 1, never falling: 0.01 → 0.03, 0.03 → 0.06, 0.04 → 0.06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_other_prompts_cannot_be_paired() -> None:
    with pytest.raises(DataError, match=r"shapes \(1, 80\) and \(1, 3\) cannot be paired"):
        crossed_difference(A, [[1, 2, 3]])
    with pytest.raises(DataError, match=r"shapes \(2, 80\) and \(3, 80\) cannot be paired"):
        crossed_difference(A.repeat(2, 0), A.repeat(3, 0))
    with pytest.raises(DataError, match="give finite numbers for"):
        crossed_mean([[float("nan")]])
