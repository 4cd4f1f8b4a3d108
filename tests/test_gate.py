"""Keeps are rectangles: never empty, whole buckets, equal groups; gradients pass as if the gates were soft."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.gate import Gate, keep_ratio, rows_agree
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner

MHA, GQA = HeadGeometry(8, 8, 4), HeadGeometry(12, 3, 4)

geometries = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda n: HeadGeometry(n[0] * n[1], n[0], 4))
cases = st.tuples(geometries, st.integers(0, 2**31), st.floats(-3, 3), st.none() | st.integers(1, 9))
quick = settings(max_examples=150)


def scores_of(geometry, seed, shift):
    """(4, H), with ties."""
    scores = torch.randn(4, geometry.heads, generator=torch.Generator().manual_seed(seed)) + shift
    return (scores * 4).round() / 4


@quick
@given(cases)
def test_a_rectangle_is_never_empty_and_its_kept_groups_are_equal(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    for row in geometry.by_group(geometry.rectangle(scores, bucket)).sum(-1):
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
        expected, actual = (torch.autograd.grad(loss, logits) for loss in losses)
        assert all(one.equal(other) and one.any() for one, other in zip(expected, actual, strict=True))


@quick
@given(cases)
def test_a_rectangle_holds_at_least_as_many_heads_as_were_requested(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    assert (geometry.rectangle(scores, bucket).sum(-1) >= (scores > 0).sum(-1)).all()


@quick
@given(cases)
def test_without_groups_all_requested_heads_are_kept_in_whole_buckets(case):
    geometry, seed, shift, bucket = case
    geometry = HeadGeometry(geometry.heads, geometry.heads, 4)
    scores = scores_of(geometry, seed, shift)
    keep = geometry.rectangle(scores, bucket)
    assert not ((scores > 0) & ~keep).any()
    size = bucket or max(1, geometry.heads // 8)
    requested = (scores > 0).sum(-1).clamp(min=1)
    assert keep.sum(-1).tolist() == [min(-(-int(n) // size) * size, geometry.heads) for n in requested]


@quick
@given(cases)
def test_a_row_is_decided_without_its_neighbours(case):
    geometry, seed, shift, bucket = case
    scores = scores_of(geometry, seed, shift)
    alone = torch.cat([geometry.rectangle(row[None], bucket) for row in scores])
    assert alone.equal(geometry.rectangle(scores, bucket))


def test_the_best_heads_fill_the_bucket():
    scores = torch.tensor([[-1.0, 3, -4, 2, 1, -2, -3, -5]])
    assert MHA.rectangle(scores, 4).int().tolist() == [[1, 1, 0, 1, 1, 0, 0, 0]]
    assert MHA.rectangle(scores - 9, 1).int().tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_groups_without_a_requested_head_go_and_the_others_keep_equally_many():
    scores = torch.tensor([[5.0, 4, 3, -1, -1, -1, -1, -1, 1, -2, -3, -4]])
    assert GQA.rectangle(scores, 1).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]]


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "firm"}, "gate mode 'firm' is unknown; choose hard, straight-through or soft"),
        ({"temperature": 0}, "temperature=0 was given; it must be above 0"),
        ({"bucket": 0}, "bucket=0 was given; it must be at least 1"),
    ],
)
def test_impossible_gates_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Gate(**options)


def test_a_bucket_that_would_keep_every_head_is_refused():
    Gate(bucket=7).check_bucket([MHA, GQA])
    Gate(bucket=1).check_bucket([HeadGeometry(1, 1, 4)])
    with pytest.raises(
        ConfigError, match="bucket=8 was given, but a site has 8 units, all of which would always be kept"
    ):
        Gate(bucket=8).check_bucket([GQA, MHA])


def test_noise_of_some_rows_is_that_of_the_whole_batch():
    """A process with every second row of a batch draws for these rows what one process with all of them draws."""
    logits = torch.zeros(6, 8)
    torch.manual_seed(0)
    whole = Gate(mode="soft", noise=1.0)(logits, MHA)
    torch.manual_seed(0)
    share = Gate(mode="soft", noise=1.0, rows=range(1, 6, 2))(logits[1::2], MHA)
    torch.testing.assert_close(share, whole[1::2], atol=1e-6, rtol=0)


def test_rows_agree_when_they_do_on_every_site():
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert rows_agree([alike, alike])
    assert not rows_agree([alike, torch.tensor([[1.0, 0.0], [1.0, 1.0]])])


@pytest.mark.parametrize("threshold", [0.0, 2.5, 1e9])
@pytest.mark.parametrize("share", [0.25, 0.3, 1.0])
def test_a_floor_keeps_the_best_of_every_site_and_changes_nothing_above_it(threshold, share):
    geometry = HeadGeometry(8, 8, 4)
    logits = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    free = Gate(threshold=threshold, bucket=1)(logits, geometry)
    kept = Gate(threshold=threshold, bucket=1, least_kept=share)(logits, geometry)
    least = math.ceil(share * 8)
    for row, before, after in zip(logits, free, kept, strict=True):
        requested = int((row > threshold).sum())
        if requested >= least:
            assert after.equal(before)
        else:
            best = row.argsort(descending=True)[:least]
            assert after.nonzero().flatten().tolist() == sorted(best.tolist())


def test_a_budget_counts_the_floor():
    geometry = HeadGeometry(8, 8, 4)
    logits = [torch.randn(16, 8, generator=torch.Generator().manual_seed(site)) - 4 * site for site in range(2)]
    pruner = Pruner(StaticPolicy.all_kept([geometry] * 2), Gate(bucket=1, least_kept=0.5)).with_budget(
        logits, [geometry] * 2
    )
    assert pruner.budget.keep_ratio(1e9) == 0.5
    chosen = pruner.at(0.75)
    assert chosen.budget.keep_ratio(chosen.gate.threshold) == pytest.approx(0.75, abs=0.05)
    keep = chosen.keep(logits, [geometry] * 2)
    assert min(int(k.sum(-1).min()) for k in keep) >= 4
    with pytest.raises(ConfigError, match=r"least_kept=1\.5 was given; it must be at most 1"):
        Gate(least_kept=1.5)
