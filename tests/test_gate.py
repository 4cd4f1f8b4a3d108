"""Keeps are rectangles: never empty, whole buckets, equal groups; gradients pass as if the gates were soft."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio, rectangle, threshold_for
from microglia.geometry import HeadGeometry

MHA, GQA = HeadGeometry(8, 8, 4), HeadGeometry(12, 3, 4)

geometries = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda n: HeadGeometry(n[0] * n[1], n[0], 4))
cases = st.tuples(geometries, st.integers(0, 2**31), st.floats(-3, 3), st.none() | st.integers(1, 9))
quick = settings(max_examples=150, deadline=None, derandomize=True)


def scores_of(geometry, seed, shift):
    """(4, H), with ties."""
    scores = torch.randn(4, geometry.heads, generator=torch.Generator().manual_seed(seed)) + shift
    return (scores * 4).round() / 4


@quick
@given(cases)
def test_a_rectangle_is_never_empty_and_its_kept_groups_are_equal(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    for row in geometry.by_group(rectangle(scores, geometry, bucket)).sum(-1):
        assert len(row[row > 0].unique()) == 1


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("options", [{}, {"mode": "straight-through"}, {"mode": "soft"}, {"noise": 1.0}], ids=str)
def test_sites_together_decide_as_one_by_one(alike, options):
    sites, gate = [GQA, GQA, GQA if alike else MHA], Gate(**options)
    logits = [scores_of(g, seed, 0).requires_grad_() for seed, g in enumerate(sites)]
    torch.manual_seed(0)
    apart = [gate(x, g) for x, g in zip(logits, sites, strict=True)]
    torch.manual_seed(0)
    together = gate.every(logits, sites)
    assert all(one.equal(other) for one, other in zip(apart, together, strict=True))
    if gate.trains:
        weights = [torch.rand_like(keep) for keep in apart]
        losses = [sum((k * w).sum() for k, w in zip(keep, weights, strict=True)) for keep in (apart, together)]
        expected, found = (torch.autograd.grad(loss, logits) for loss in losses)
        assert all(one.equal(other) and one.any() for one, other in zip(expected, found, strict=True))


@quick
@given(cases)
def test_a_rectangle_holds_at_least_as_many_heads_as_were_asked_for(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    assert (rectangle(scores, geometry, bucket).sum(-1) >= (scores > 0).sum(-1)).all()


@quick
@given(cases)
def test_without_groups_all_asked_heads_are_kept_in_whole_buckets(case):
    geometry, seed, shift, bucket = case
    geometry = HeadGeometry(geometry.heads, geometry.heads, 4)
    scores = scores_of(geometry, seed, shift)
    keep = rectangle(scores, geometry, bucket)
    assert not ((scores > 0) & ~keep).any()
    size = bucket or max(1, geometry.heads // 8)
    asked = (scores > 0).sum(-1).clamp(min=1)
    assert keep.sum(-1).tolist() == [min(-(-int(n) // size) * size, geometry.heads) for n in asked]


@quick
@given(cases)
def test_a_row_is_decided_without_its_neighbours(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    alone = torch.cat([rectangle(row[None], geometry, bucket) for row in scores])
    assert alone.equal(rectangle(scores, geometry, bucket))


def test_the_best_heads_fill_the_bucket():
    scores = torch.tensor([[-1.0, 3, -4, 2, 1, -2, -3, -5]])
    assert rectangle(scores, MHA, 4).int().tolist() == [[1, 1, 0, 1, 1, 0, 0, 0]]
    assert rectangle(scores - 9, MHA, 1).int().tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_groups_that_nobody_asks_for_go_and_the_others_keep_equally_many():
    scores = torch.tensor([[5.0, 4, 3, -1, -1, -1, -1, -1, 1, -2, -3, -4]])
    assert rectangle(scores, GQA, 1).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]]


def test_hard_ignores_the_temperature_and_follows_the_threshold():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert Gate(temperature=0.1, bucket=1)(logits, MHA).equal(Gate(temperature=9.0, bucket=1)(logits, MHA))
    assert Gate(threshold=0.5, bucket=1)(logits, MHA).equal(Gate(bucket=1)(logits - 0.5, MHA))


@pytest.mark.parametrize("geometry", [MHA, GQA], ids=["mha", "gqa"])
def test_straight_through_is_exactly_hard_with_the_gradient_of_the_sigmoid(geometry):
    logits = torch.randn(5, geometry.heads, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(geometry.heads, dtype=torch.float32)
    keep = Gate(mode="straight-through", temperature=0.7)(logits, geometry)
    assert keep.equal(Gate(mode="hard")(logits, geometry))
    (given_,) = torch.autograd.grad((keep * weights).sum(), logits)
    (truth,) = torch.autograd.grad((torch.sigmoid(logits / 0.7) * weights).sum(), logits)
    assert given_.equal(truth)


def test_soft_is_the_sigmoid():
    logits = torch.randn(5, 8)
    assert Gate(mode="soft", temperature=0.5, threshold=0.2)(logits, MHA).equal(torch.sigmoid((logits - 0.2) / 0.5))


def test_noise_flips_decisions_near_the_threshold_only():
    torch.manual_seed(0)
    logits = torch.tensor([[0.01, -0.01, 40, 40, -40, -40, 40, -40]]).expand(200, -1)
    keep = Gate(mode="straight-through", noise=1.0, bucket=1)(logits, MHA)
    assert 60 < keep[:, 0].sum() < 140
    assert keep[:, 2:].mean(0).tolist() == [1, 1, 0, 0, 1, 0]


def test_keep_ratio_counts_heads_over_all_sites():
    assert keep_ratio([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])]).tolist() == [
        pytest.approx(4 / 6)
    ]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("geometry", "coarseness"), [(MHA, 0.001), (GQA, 0.02)], ids=["mha", "gqa"])
def test_the_threshold_hits_its_target_from_above(target, geometry, coarseness):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(200, geometry.heads, generator=generator) for _ in range(4)]
    threshold = threshold_for(logits, [geometry] * 4, target, bucket=1)
    keep = torch.cat([Gate(threshold=threshold, bucket=1)(x, geometry) for x in logits])
    assert target - 1e-4 <= keep.mean() < target + coarseness
    if target < 1:
        assert len(keep.sum(-1).unique()) > 1  # prompts still differ


@pytest.mark.parametrize("target", [0, -0.1, 1.01])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ConfigError, match=f"keep_ratio={target} was given; it must be above 0 and at most 1"):
        threshold_for([torch.randn(3, 8)], [MHA], target)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "firm"}, "gate='firm' is unknown; choose one of hard, straight-through, soft"),
        ({"temperature": 0}, "temperature=0 was given; it must be above 0"),
        ({"bucket": 0}, "bucket=0 was given; it must be at least 1"),
    ],
)
def test_impossible_gates_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Gate(**options)
