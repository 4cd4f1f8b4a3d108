"""Levels cover every decision, and a decision laid out in a level keeps what was asked for, once, and adds nothing."""

import pytest
import torch

from microglia.errors import ConfigError
from microglia.anatomy import HeadGeometry
from microglia.execution.captured.kv import Place, StaticKV
from microglia.execution.captured.levels import Level, covering, ladder, placed

LLAMA = HeadGeometry(32, 8, 4)


def decisions(geometry, rows, *, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, geometry.heads, generator=generator) < torch.rand(rows, 1, generator=generator)
    keep[:, seed % geometry.heads] = True
    return keep.float()


def test_a_ladder_ends_at_the_lowest_share():
    assert [level.heads for level in ladder(HeadGeometry(32, 32, 4))] == [32, 28, 24, 20, 16]
    assert [(level.groups, level.queries) for level in ladder(HeadGeometry(4, 2, 4))] == [
        (2, 2),
        (2, 1),
        (1, 2),
        (1, 1),
    ]
    assert ladder(LLAMA, 1.0) == (Level(8, 4),)
    assert len(ladder(LLAMA)) == 15
    with pytest.raises(ConfigError, match="lowest=0 was given; the smallest level must be above 0 and at most 1"):
        ladder(LLAMA, 0)


def test_the_smallest_level_that_covers_is_chosen():
    levels = ladder(LLAMA)
    assert covering(levels, 8, 4) == levels[0]
    assert covering(levels, 6, 4) == Level(6, 4)
    assert covering(levels, 8, 1) == Level(8, 2)
    assert covering(levels, 1, 1) == Level(4, 2)


@pytest.mark.parametrize("geometry", [LLAMA, HeadGeometry(8, 8, 4), HeadGeometry(8, 1, 4)], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_what_is_asked_for_has_a_place_and_only_that_is_asked_for(geometry, seed):
    keep = decisions(geometry, 5, seed=seed)
    grouped = geometry.by_group(keep > 0)
    level = covering(ladder(geometry, 0.1), int(grouped.any(-1).sum(-1).max()), int(grouped.sum(-1).max()))
    placement = placed(keep, geometry, level)
    assert placement.slots.shape == (5, level.groups)
    for row in range(5):
        heads, asked = placement.heads[row], placement.asked[row]
        assert len(set(heads.tolist())) == level.heads
        assert sorted(heads[asked].tolist()) == keep[row].nonzero().flatten().tolist()
        assert geometry.group_of(heads).tolist() == placement.slots[row].repeat_interleave(level.queries).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_moving_brings_each_rows_groups_to_their_places_and_may_be_done_twice(seed):
    geometry, keep = HeadGeometry(8, 8, 2), decisions(HeadGeometry(8, 8, 2), 3, seed=seed)
    level = covering(ladder(geometry, 0.1), int(keep.sum(-1).max()), 1)
    kv = StaticKV(geometry, 3, 5, Place(torch.zeros(1)), dtype=torch.float32, device=torch.device("cpu"))
    kv.keys.normal_()
    kv.values.normal_()
    before = kv.keys.clone(), kv.values.clone()
    placement = placed(keep, geometry, level)
    for _ in range(2):
        kv.move(placement)
        for row in range(3):
            assert kv.keys[row, : level.groups].equal(before[0][row, placement.slots[row]])
            assert kv.values[row, : level.groups].equal(before[1][row, placement.slots[row]])


def test_with_every_head_kept_a_move_moves_nothing():
    """Warming up at any level must not disturb a prompt that waits."""
    geometry = HeadGeometry(8, 8, 2)
    placement = placed(torch.ones(2, 8), geometry, Level(5, 1))
    assert placement.source.equal(placement.target)
    assert placement.slots.tolist() == [[0, 1, 2, 3, 4]] * 2
