"""A pruner is one value; its budget turns a keep ratio into a threshold."""

from dataclasses import replace

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio
from microglia.policies import StaticPolicy
from microglia.pruner import THRESHOLDS, Budget, Pruner
from microglia.signals import SIGNALS
from tests.tiny import tiny_model, uneven, wild

MHA, GQA = HeadGeometry(8, 8, 4), HeadGeometry(12, 3, 4)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("geometry", "coarseness"), [(MHA, 0.001), (GQA, 0.02)], ids=["mha", "gqa"])
def test_the_threshold_hits_its_target_from_above(target, geometry, coarseness):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(200, geometry.heads, generator=generator) for _ in range(4)]
    threshold = Budget(logits, [geometry] * 4, 1).threshold(target)
    keep = torch.cat([Gate(threshold=threshold, bucket=1)(x, geometry) for x in logits])
    assert target - 1e-4 <= keep.mean() < target + coarseness
    if target < 1:
        assert len(keep.sum(-1).unique()) > 1  # prompts still differ


@pytest.mark.parametrize(("heads", "kept"), [(10, 9), (10, 7), (20, 19), (12, 5)])
def test_a_share_that_can_be_kept_exactly_is(heads, kept):
    budget = Budget([torch.arange(heads).float()[None]], [HeadGeometry(heads, heads, 4)], 1)
    assert budget.keep_ratio(budget.threshold(kept / heads)) == pytest.approx(kept / heads)


def test_a_threshold_is_found_once_and_looked_up_from_then_on(monkeypatch):
    searches, keep_ratio = [], Budget.keep_ratio
    monkeypatch.setattr(Budget, "keep_ratio", lambda *args: searches.append(1) or keep_ratio(*args))
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    first, second = Budget([logits], [MHA], 1), Budget([logits + 1], [MHA], 1)
    thresholds = [[budget.threshold(target) for target in (0.5, 0.75)] for budget in (first, second)]
    assert thresholds[0] != thresholds[1]  # each budget knows its own
    done = len(searches)
    assert done > 0
    for _ in range(24):
        assert [[budget.threshold(target) for target in (0.5, 0.75)] for budget in (first, second)] == thresholds
    assert len(searches) == done
    assert first._known_thresholds.cache_info().maxsize == THRESHOLDS  # clients may ask for any number of them


def test_prompts_count_in_a_budget_by_their_weights():
    """Σ nᵢ·keepᵢ / Σ nᵢ: the keep ratio is that of a budget in which a prompt stands as often as it counts."""
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(6, g.heads, generator=generator) for g in (MHA, GQA)]
    weights = torch.tensor([1, 1, 9, 2, 1, 30])
    repeated = Budget([x.repeat_interleave(weights, 0) for x in logits], [MHA, GQA], 1)
    weighted, alike = (Budget(logits, [MHA, GQA], 1, w) for w in (weights, None))
    for target in (0.3, 0.6, 0.9):
        threshold = repeated.threshold(target)
        assert weighted.threshold(target) == threshold
        assert weighted.keep_ratio(threshold) == pytest.approx(repeated.keep_ratio(threshold))
    assert weighted.keep_ratio(threshold) != pytest.approx(alike.keep_ratio(threshold))
    assert Budget(logits, [MHA, GQA], 1, torch.full((6,), 7)).threshold(0.5) == alike.threshold(0.5)


@pytest.mark.parametrize("target", [0, -0.1, 1.01])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ConfigError, match=f"keep_ratio={target} was given; it must be above 0 and at most 1"):
        Budget([torch.randn(3, 8)], [MHA]).threshold(target)


def test_a_pruner_at_a_keep_ratio_keeps_that_share_on_the_prompts_of_its_budget():
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(200, g.heads, generator=generator) for g in (MHA, MHA)]
    pruner = Pruner(StaticPolicy.all_kept([MHA, MHA]), Gate(bucket=1)).with_budget(logits, [MHA, MHA])
    assert pruner.budget.prompts == 200
    assert pruner.budget.bucket == 1
    assert pruner.at(None) is pruner
    half = pruner.at(0.5)
    assert float(torch.cat(half.keep(logits, [MHA, MHA])).mean()) == pytest.approx(0.5, abs=0.01)
    assert half.budget is pruner.budget
    assert half.gate.threshold == pruner.budget.threshold(0.5) != pruner.gate.threshold
    assert pruner.budget.keep_ratio(half.gate.threshold) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("budget", [None, Budget([torch.zeros(0, 8)], [MHA]), Budget([], [])])
def test_a_keep_ratio_without_prompts_to_calibrate_it_on_is_refused(budget):
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 was given, but there are no prompts to calibrate it on"):
        Pruner(StaticPolicy.all_kept([MHA]), budget=budget).at(0.5)


def test_a_fingerprint_is_equal_for_pruners_that_decide_alike_and_for_no_others():
    model = tiny_model("llama")
    pruner, same = uneven(model), uneven(model)
    assert wild(model).fingerprint() == wild(model).fingerprint()
    others = [wild(model, seed=1), wild(model, window=3), wild(model, fill="mean"), wild(model, gate=Gate(bucket=2))]
    prints = {wild(model).fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == 5
    assert pruner.fingerprint() == same.fingerprint()
    assert wild(model, gate=Gate(bucket=1, rows=range(3))).fingerprint() == wild(model).fingerprint()


def test_what_is_measured_is_what_the_policy_and_the_fill_need():
    model = tiny_model("llama")
    assert wild(model, signals=("entropy",)).signals == [SIGNALS["entropy"]]
    assert [signal.name for signal in wild(model, fill="mean").signals] == ["norm", "entropy", "mean_output"]
    assert Pruner(StaticPolicy.all_kept([MHA])).signals == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fill": "max"}, "fill='max' is unknown; choose zero or mean"),
        ({"window": 0}, "window=0 was given; it must"),
        ({"units": ("neuron",)}, "units='neuron' is unknown; choose head, channel or sublayer"),
    ],
)
def test_impossible_pruners_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Pruner(StaticPolicy.all_kept([MHA]), **options)


def test_a_budget_counts_in_the_gates_bucket_whatever_it_was_made_with():
    logits = [torch.randn(50, 8, generator=torch.Generator().manual_seed(2))]
    policy, budget = StaticPolicy(logits=[logits[0][0]]), Budget(logits, [MHA])
    for pruner in (
        Pruner(policy, Gate(bucket=4), budget=budget),
        replace(Pruner(policy, budget=budget), gate=Gate(bucket=4)),
    ):
        at = pruner.at(0.6)
        assert keep_ratio(at.keep(logits, [MHA])).mean() == pytest.approx(at.budget.keep_ratio(at.gate.threshold))
        assert at.budget.bucket == 4
