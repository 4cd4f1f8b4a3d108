"""What a comparison says of runs made by hand."""

import numpy as np
import pytest

from microglia.benchmark import TimedRun
from microglia.errors import DataError
from microglia.evaluation.run import Answer, Evaluation
from microglia.evaluation.significance import mcnemar_exact, paired_difference
from microglia.experiments.compare.summary import Run, equal_times, summarise
from microglia.experiments.measure import Measured

N = 40
DENSE = [1] * 36 + [0] * 4


def timed(ratio: float, width: float = 0.0) -> TimedRun:
    """Three repetitions of two prompts whose requests are so many times as fast as dense ones, ± width."""
    ratios = (ratio - width, ratio, ratio + width)
    return TimedRun(
        dense=[100.0] * 3,
        pruned=[100 / r for r in ratios],
        dense_steps=[80.0] * 3,
        steps=[80 / r for r in ratios],
        parts={"reading": 10.0, "steps": 40 / ratio},
        charged=("reading", "steps"),
        prompts=2,
        tokens=22,
        keep_ratio=0.7,
        kv_bytes=100.0,
        bytes=(200, 100),
    )


def run(policy: str, correct, *, target=0.7, seed=0, kept=0.7, ratio=None, first=0, width=0.0) -> Run:
    """A run; timed where there is a ratio to dense."""

    def answer(i: int, right: int) -> Answer:
        return Answer(f"{first + i}", "", bool(right), kept + (i % 4) / 100, 10 + 10 * (i % 4), i % 4, "ab"[i % 2])

    answers = tuple(answer(i, c) for i, c in enumerate(correct))
    measured = Measured(Evaluation(answers, 1.0), tuple(1.0 - c / 2 for c in correct))
    return Run(policy, target, seed, measured, None if ratio is None else timed(ratio, width))


def flipped(*indices: int) -> list[int]:
    return [1 - c if i in indices else c for i, c in enumerate(DENSE)]


RUNS = [
    run("dense", DENSE, target=1.0, kept=1.0, ratio=1.0),
    run("agents", flipped(0, 1), ratio=1.3),
    run("static_baseline", flipped(*range(8)), ratio=1.3, seed=0),
    run("static_baseline", flipped(*range(10)), seed=1),
    run("random", flipped(*range(20)), ratio=1.2),
]


def test_a_row_has_what_the_interface_promises() -> None:
    result = summarise(RUNS, 0.7)
    promised = {"policy", "keep_ratio", "accuracy", "ci95", "loss"}
    written = result.to_json()["rows"]
    assert all(promised | {"keep_ratio_per_token", "request", "latency"} <= row.keys() for row in written)
    assert [row.policy for row in result.rows] == ["dense", "agents", "static_baseline", "random"]
    dense, agents, baseline, _ = result.rows
    assert (dense.latency.ms_per_token, dense.request.ms, dense.request.ratio_to_dense) == (4.0, 50.0, 1.0)
    assert (agents.latency.ceiling, agents.latency.kv_bytes) == (2.0, 100)
    assert agents.keep_ratio_per_token == pytest.approx(0.7 + (10 * 0 + 20 * 1 + 30 * 2 + 40 * 3) / 100 / 100)
    assert agents.accuracy == 34 / 40
    assert agents.loss == pytest.approx(1 - 34 / 80)
    assert baseline.accuracy == pytest.approx((28 + 26) / 80)
    assert baseline.seeds == (0, 1)
    assert agents.to_dense.diff == pytest.approx(-2 / 40)
    assert agents.to_dense.p_value == mcnemar_exact(flipped(0, 1), DENSE)
    assert agents.keep_ratio == pytest.approx(0.715)


def test_what_adaptivity_adds_is_one_paired_number() -> None:
    result = summarise([c for c in RUNS if c.seed == 0], 0.7).adaptivity
    paired = paired_difference(flipped(0, 1), flipped(*range(8)), resamples=2_000)
    assert (result.gain, result.ci95) == (paired.diff, paired.ci95)
    assert result.target == 0.7
    assert result.loss.diff == pytest.approx(-paired.diff / 2)
    over_seeds = summarise(RUNS, 0.7).adaptivity
    assert over_seeds.gain == pytest.approx(7 / 40)
    assert over_seeds.ci95[0] < 7 / 40 < over_seeds.ci95[1]


def test_several_tests_are_corrected_together() -> None:
    rows = summarise(RUNS, 0.7).rows
    p = sorted(row.to_dense.p_value for row in rows[1:])
    worst = min(rows[1:], key=lambda row: row.to_dense.p_value)
    assert worst.to_dense.p_holm == pytest.approx(min(1, 3 * p[0]))
    assert rows[1].agents_to_this is None
    assert rows[3].agents_to_this.p_holm >= rows[3].agents_to_this.p_value


def test_the_front_loses_only_what_is_surely_beaten() -> None:
    rows = summarise(RUNS, 0.7).rows
    # the baseline is as fast as the agents and its accuracy may be theirs; random is surely slower and worse
    assert [row.pareto_latency for row in rows] == [True, True, True, False]
    close = [*RUNS[:2], run("static_baseline", flipped(0, 1, 2), ratio=1.31), run("random", flipped(0, 1), ratio=1.25)]
    assert [row.pareto_latency for row in summarise(close, 0.7).rows] == [True, True, True, False]
    wide = [*close[:3], run("random", flipped(0, 1), ratio=1.25, width=0.1)]
    assert [row.pareto_latency for row in summarise(wide, 0.7).rows] == [True] * 4  # its interval reaches 1.3
    untimed = summarise([Run(r.policy, r.target, r.seed, r.measured) for r in RUNS], 0.7).rows
    assert untimed[0].pareto_latency is None
    assert untimed[1].pareto_sparsity


def test_times_of_all_seeds_count() -> None:
    seeds = [run("static_baseline", DENSE, seed=seed, ratio=ratio) for seed, ratio in enumerate((1.0, 1.2, 1.4))]
    request = summarise([*RUNS[:2], *seeds], 0.7).rows[2].request
    assert (request.n, request.ratio_to_dense) == (9, pytest.approx(1.2))
    assert request.ratio_ci95[0] < 1.2 < request.ratio_ci95[1]


def test_the_baseline_at_equal_time_keeps_what_its_own_times_say() -> None:
    def baseline(target, ratio):
        return run("static_baseline", DENSE, target=target, ratio=ratio)

    runs = [RUNS[0], baseline(0.75, 1 / 0.9), baseline(0.5, 1 / 0.8)]
    agents = {0.75: 1 / 0.95, 0.5: 1 / 0.85, 0.25: 0.9}
    runs += [run("agents", DENSE, target=target, ratio=ratio) for target, ratio in agents.items()]
    # half-way between dense and .75, half-way between .75 and .5, slower than dense
    assert equal_times(runs, "agents", "static_baseline") == {0.75: 0.875, 0.5: 0.625, 0.25: 1.0}


def test_sparsity_by_difficulty_and_family() -> None:
    result = summarise(RUNS, 0.7)
    assert result.follows_difficulty.rank_correlation == pytest.approx(-1)
    by_family = result.sparsity_by_family
    assert list(by_family) == ["a", "b"]
    assert by_family["a"] - by_family["b"] == pytest.approx(0.01)


def test_sparsity_is_the_mean_over_seeds() -> None:
    first, second = run("agents", DENSE, seed=0, kept=0.6), run("agents", DENSE, seed=1, kept=0.8)
    for c in second.measured.answers.answers:  # the opposite, and twice as loud
        object.__setattr__(c, "keep_ratio", 0.8 - 2 * (int(c.id) % 4) / 100)
    runs = [RUNS[0], first, second, RUNS[2]]
    result = summarise(runs, 0.7)
    assert result.follows_difficulty.rank_correlation == pytest.approx(1)
    assert result.sparsity_by_difficulty["0"] == pytest.approx(0.3)
    assert result.sparsity_by_difficulty["3"] == pytest.approx(1 - (0.63 + 0.74) / 2)


def test_other_prompts_or_a_missing_baseline_are_refused() -> None:
    with pytest.raises(DataError, match="answered different prompts"):
        summarise([*RUNS, run("norm", DENSE, first=5)], 0.7)
    missing = r"no run of static_baseline at the keep ratio 0.7; measure it there"
    with pytest.raises(DataError, match=missing):
        summarise([c for c in RUNS if c.policy != "static_baseline"], 0.7)
    with pytest.raises(DataError, match=r"no run of agents at the keep ratio 0.5"):
        summarise(RUNS, 0.5)


def test_a_baseline_as_good_as_the_agents_adds_nothing() -> None:
    runs = [RUNS[0], RUNS[1], run("static_baseline", flipped(0, 1), ratio=1.3)]
    result = summarise(runs, 0.7).adaptivity
    assert result.gain == 0
    assert result.ci95[0] < 0 < result.ci95[1]
    assert np.isfinite(result.p_value)
