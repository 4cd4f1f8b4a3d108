"""Buckets cover every decision; a decision laid out in one keeps what it kept, once, and adds nothing."""

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.execution.captured.buckets import Bucket, buckets, covering, slot_map
from microglia.execution.captured.kv import Place, StaticKV

LLAMA = HeadGeometry(32, 8, 4)


def decisions(geometry, rows, *, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, geometry.heads, generator=generator) < torch.rand(rows, 1, generator=generator)
    keep[:, seed % geometry.heads] = True
    return keep.float()


def test_buckets_end_at_the_lowest_share():
    assert [bucket.heads for bucket in buckets(HeadGeometry(32, 32, 4))] == [32, 28, 24, 20, 16]
    assert [(bucket.groups, bucket.queries) for bucket in buckets(HeadGeometry(4, 2, 4))] == [
        (2, 2),
        (2, 1),
        (1, 2),
        (1, 1),
    ]
    assert buckets(LLAMA, 1.0) == (Bucket(8, 4),)
    assert len(buckets(LLAMA)) == 15
    with pytest.raises(ConfigError, match="lowest=0 was given; the smallest bucket must be above 0 and at most 1"):
        buckets(LLAMA, 0)


def test_the_smallest_bucket_that_covers_is_chosen():
    every = buckets(LLAMA)
    assert covering(every, 8, 4) == every[0]
    assert covering(every, 6, 4) == Bucket(6, 4)
    assert covering(every, 8, 1) == Bucket(8, 2)
    assert covering(every, 1, 1) == Bucket(4, 2)


@pytest.mark.parametrize("geometry", [LLAMA, HeadGeometry(8, 8, 4), HeadGeometry(8, 1, 4)], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_has_a_slot_and_only_that_is_kept(geometry, seed):
    keep = decisions(geometry, 5, seed=seed)
    grouped = geometry.by_group(keep > 0)
    bucket = covering(buckets(geometry, 0.1), int(grouped.any(-1).sum(-1).max()), int(grouped.sum(-1).max()))
    slots = slot_map(keep, geometry, bucket)
    assert slots.groups.shape == (5, bucket.groups)
    for row in range(5):
        heads, kept = slots.heads[row], slots.kept[row]
        assert len(set(heads.tolist())) == bucket.heads
        assert sorted(heads[kept].tolist()) == keep[row].nonzero().flatten().tolist()
        assert geometry.group_of(heads).tolist() == slots.groups[row].repeat_interleave(bucket.queries).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_moving_brings_each_rows_groups_to_their_slots_and_may_be_done_twice(seed):
    geometry, keep = HeadGeometry(8, 8, 2), decisions(HeadGeometry(8, 8, 2), 3, seed=seed)
    bucket = covering(buckets(geometry, 0.1), int(keep.sum(-1).max()), 1)
    kv = StaticKV(geometry, 3, 5, Place(torch.zeros(1)), dtype=torch.float32, device=torch.device("cpu"))
    kv.keys.normal_()
    kv.values.normal_()
    before = kv.keys.clone(), kv.values.clone()
    slots = slot_map(keep, geometry, bucket)
    for _ in range(2):
        kv.move(slots)
        for row in range(3):
            assert kv.keys[row, : bucket.groups].equal(before[0][row, slots.groups[row]])
            assert kv.values[row, : bucket.groups].equal(before[1][row, slots.groups[row]])


def test_with_every_head_kept_a_move_moves_nothing():
    """Warming up at any bucket must not disturb a prompt that waits."""
    geometry = HeadGeometry(8, 8, 2)
    slots = slot_map(torch.ones(2, 8), geometry, Bucket(5, 1))
    assert slots.source.equal(slots.target)
    assert slots.groups.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_rows_that_agree_have_the_slots_of_each_alone():
    geometry, bucket = LLAMA, Bucket(6, 2)
    keep = torch.zeros(2, 3, 32)
    keep[0, :, [1, 2, 28, 30]] = keep[1, :, [0, 9, 17, 31]] = 1
    together = slot_map(keep, geometry, bucket)
    for site in range(2):
        for row in range(3):
            alone = slot_map(keep[site, row : row + 1], geometry, bucket)
            for name in ("groups", "heads", "kept"):
                assert getattr(together, name)[site, row].equal(getattr(alone, name)[0])
            for name in ("source", "target"):
                assert getattr(together, name)[site, row].equal(getattr(alone, name)[0] * 3 + row)
