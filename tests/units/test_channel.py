"""Blocks of channels: counted by hand, cut from any order, never empty, the shared ones always there."""

import pytest
import torch
from torch import nn

from microglia.errors import ConfigError, UnsupportedModelError
from microglia.gate import Gate
from microglia.units import Arrangement, ChannelGeometry, find_sites
from tests.tiny import tiny_model
from tests.units.many import shuffled


@pytest.mark.parametrize(
    ("channels", "block", "expected"),
    [
        (1536, 64, (64, 24)),
        (4864, 64, (64, 76)),
        (64, 64, (8, 8)),
        (192, 64, (24, 8)),
        (60, 64, (6, 10)),
        (7, 64, (1, 7)),
    ],
)
def test_blocks_are_the_largest_divisor_that_leaves_eight(channels, block, expected):
    geometry = ChannelGeometry.divided(channels, block)
    assert (geometry.block, geometry.count) == expected
    assert ChannelGeometry.divided(channels, 1).count == channels


@pytest.mark.parametrize("numbers", [(64, 10, 0), (0, 1, 0), (64, 8, 9), (64, 8, -1)])
def test_impossible_geometries_are_refused(numbers):
    with pytest.raises(ConfigError, match="make no geometry; the channels must be a multiple of the block"):
        ChannelGeometry(*numbers)


def test_rectangles_keep_the_best_rounded_up_never_nothing_and_what_is_shared():
    scores = torch.tensor([[-1.0, 3, 2, -2, 1, -3, -4, -5], [-1, -2, -3, -4, -5, -6, -7, -8]])
    assert ChannelGeometry(64, 8).rectangle(scores, 1).int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [1] + [0] * 7]
    assert ChannelGeometry(64, 8).rectangle(scores, 4).sum(-1).tolist() == [4, 4]
    shared = ChannelGeometry(64, 8, protected=2).rectangle(scores, 1)
    assert shared.int().tolist() == [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert ChannelGeometry.divided(64, shared=0.25).protected == 2


@pytest.mark.parametrize("mode", ["hard", "straight-through", "soft"])
def test_every_gate_keeps_what_is_protected_and_learns_nothing_of_it(mode):
    logits = torch.full((2, 8), -9.0, requires_grad=True)
    keep = Gate(mode, bucket=1)(logits, ChannelGeometry(64, 8, protected=3))
    assert keep[:, :3].eq(1).all()
    assert (keep[:, 3:] < 1e-3).all()
    if mode != "hard":
        (gradient,) = torch.autograd.grad(keep.sum(), logits)
        assert gradient[:, :3].eq(0).all()
        assert gradient[:, 3:].gt(0).all()


def test_a_block_is_a_list_of_channels_in_the_arrangements_order(family):
    model = tiny_model(family)
    arrangement = shuffled(model)
    for site, order in zip(find_sites(model, ("channel",), arrangement), arrangement.orders, strict=True):
        x = torch.arange(site.geometry.channels) * 1.0
        blocks = site.split(x)
        assert blocks.long().flatten().equal(order)
        assert site.joined(blocks).equal(x)
        keep = torch.zeros(site.geometry.count, dtype=torch.bool)
        keep[[1, 4]] = True
        expected = torch.cat([order.view(-1, site.geometry.block)[b] for b in (1, 4)]).sort().values
        assert site.channels_of(keep).equal(expected)


def test_neighbours_that_stay_together_are_found():
    model = tiny_model("llama")
    runs = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])[:, None] * 8 + torch.arange(8)
    orders = {8: runs, 4: runs.view(-1, 4).flip(0).flatten().view(-1, 4), 1: runs.flip(1)}
    for run, order in orders.items():
        site = find_sites(model, ("channel",), Arrangement([order.flatten()] * 2))[0]
        assert site.run == run
    assert find_sites(model, ("channel",))[0].run == 8


def test_orders_that_are_none_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="the order of layer 1 is no permutation of its channels; name each one once"):
        Arrangement([torch.arange(64), torch.zeros(64, dtype=torch.long)])
    with pytest.raises(ConfigError, match="layer 0 has 64 channels, for which the arrangement has no order"):
        find_sites(model, ("channel",), Arrangement([torch.arange(32)] * 2))
    with pytest.raises(ConfigError, match="shared=2 was given; it must be at most 1"):
        Arrangement(shared=2)


def test_an_mlp_of_another_make_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp is a Identity without gate_proj, up_proj"):
        find_sites(model, ("channel",))
