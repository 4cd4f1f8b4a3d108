"""Ceilings by hand, turns in order, and intervals that hold what they should."""

import pytest
import torch

from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.latency import Clock, interleaved, paired_ratio, summary


def test_the_ceiling_is_what_the_bytes_allow() -> None:
    # 100 bytes, of which 30 attention and 10 cache, at half the heads: 100 → 60 + 15 + 5
    assert ceiling(100, 80) == 1.25
    # step 10 ms → at best 8 ms; 9 ms is half of what could be saved
    assert realised_share(10 / 9, 1.25) == pytest.approx(0.5)
    assert realised_share(1.25, 1.25) == pytest.approx(1.0)
    assert realised_share(10 / 7, 1.25) == pytest.approx(1.5)
    assert realised_share(10 / 11, 1.25) == pytest.approx(-0.5)
    assert realised_share(1.1, 1.0) is None


@pytest.mark.parametrize(
    ("overhead", "dense", "compact", "tokens"),
    [(30, 10, 8, 15), (31, 10, 8, 16), (0, 10, 8, 0), (30, 10, 10, None), (30, 10, 11, None)],
)
def test_break_even(overhead: float, dense: float, compact: float, tokens: int | None) -> None:
    assert break_even_tokens(overhead, dense, compact) == tokens


def test_variants_take_turns_and_each_repetition_begins_with_another() -> None:
    order: list[str] = []

    def turn(name):
        return lambda: order.append(name) or len(order)

    samples = interleaved({name: turn(name) for name in "abc"}, 3, warm_up=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert samples == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_a_drift_that_meets_both_variants_leaves_the_paired_ratio_alone() -> None:
    drift = [1.0, 2.0, 5.0, 9.0, 30.0]
    found = paired_ratio([12 * d for d in drift], [10 * d for d in drift])
    assert found.median == pytest.approx(1.2)
    assert found.ci95 == pytest.approx((1.2, 1.2))


def test_the_interval_holds_the_median_and_narrows_with_more_pairs() -> None:
    noise = torch.Generator().manual_seed(0)
    dense = (10 + torch.randn(400, generator=noise)).tolist()
    compact = (8 + torch.randn(400, generator=noise)).tolist()
    few, many = paired_ratio(dense[:10], compact[:10]), paired_ratio(dense, compact)
    for found in (few, many):
        assert found.ci95[0] <= found.median <= found.ci95[1]
    assert many.ci95[0] <= 1.25 <= many.ci95[1]
    assert many.ci95[1] - many.ci95[0] < few.ci95[1] - few.ci95[0]
    assert paired_ratio(dense, compact) == many


def test_a_summary_is_median_and_percentiles() -> None:
    found = summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (found.median, found.p20, found.p80, found.n) == (3.5, 2.0, 5.0, 6)


def test_the_clock_returns_milliseconds_of_the_work_it_does() -> None:
    done = []
    assert 0 <= Clock(torch.device("cpu"))(lambda: done.append(1)) < 1000
    assert done == [1]
