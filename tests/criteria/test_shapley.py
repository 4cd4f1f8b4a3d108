"""Shapley values against the sum over all coalitions."""

import itertools
import math

import pytest
import torch

from microglia.criteria.shapley import Shapley
from microglia.errors import ConfigError
from tests.criteria.calibrated import calibration, one_pass_losses

FEW = {"num_attention_heads": 2, "num_hidden_layers": 2}


class EveryOrder(Shapley):
    def orders(self, heads, generator):
        return map(torch.tensor, itertools.permutations(range(heads)))


@torch.no_grad()
def value(cal, coalition, sizes):
    keep = torch.zeros(sum(sizes))
    keep[list(coalition)] = 1
    return -float(one_pass_losses(cal, keep.split(sizes)).mean())


def exact(cal, sizes):
    players = range(sum(sizes))
    values = []
    for player in players:
        total = 0.0
        others = [p for p in players if p != player]
        for size in range(len(others) + 1):
            weight = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(players))
            for coalition in itertools.combinations(others, size):
                gain = value(cal, (*coalition, player), sizes) - value(cal, coalition, sizes)
                total += weight * gain
        values.append(total)
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"num_key_value_heads": 2}), ("qwen2", {"num_key_value_heads": 1}), ("gpt2", {})],
)
def test_every_order_gives_the_sum_over_all_coalitions(family, changes):
    cal = calibration(family, batch_size=3, **FEW, **changes)  # two batches of unequal size
    ours = torch.cat(EveryOrder(tolerance=0.0).scores(cal))
    truth = exact(calibration(family, **FEW, **changes), [2, 2])
    torch.testing.assert_close(ours.float(), truth, atol=1e-4, rtol=0)
    assert truth.std() > 1e-3


def test_few_orders_still_share_out_the_whole_and_are_seeded():
    cal = calibration("qwen2")
    scores = Shapley(permutations=1, tolerance=0.0).scores(cal)
    full, empty = value(cal, range(16), [8, 8]), value(cal, (), [8, 8])
    assert float(torch.cat(scores).sum()) == pytest.approx(full - empty, abs=1e-4)
    assert all(a.equal(b) for a, b in zip(scores, Shapley(permutations=1, tolerance=0.0).scores(cal), strict=True))
    other = Shapley(permutations=1, tolerance=0.0).scores(calibration("qwen2", seed=1))
    assert not scores[0].equal(other[0])


def test_an_order_ends_when_little_is_left_to_lose():
    class Played(Shapley):
        def orders(self, heads, generator):
            yield torch.arange(heads)

    class Numbers(type(calibration())):
        values = (-3.0, -2.95, -2.9, -1.5, -1.0)  # by the number of kept heads
        calls = 0

        def losses(self, batch, keep=None, *, prompt=None):
            type(self).calls += 1
            return torch.full((4,), -self.values[int(sum(k.sum() for k in keep))])

    base = calibration("llama", num_key_value_heads=2, **FEW)
    cal = Numbers(base.model, base.tokenizer, base.task, base.examples)
    assert torch.cat(Played(tolerance=0.1).scores(cal)).tolist() == pytest.approx([0.5, 1.4, 0, 0])
    assert Numbers.calls == 4
    assert torch.cat(Played(tolerance=0.0).scores(cal)).tolist() == pytest.approx([0.5, 1.4, 0.05, 0.05])
    Numbers.values = tuple(-x for x in Numbers.values)  # heads that do harm
    assert torch.cat(Played(tolerance=0.1).scores(cal)).tolist() == pytest.approx([-0.5, -1.4, 0, 0])


def test_wrong_options_get_a_sentence():
    with pytest.raises(ConfigError, match="permutations=0 was given; it must be above 0"):
        Shapley(permutations=0)
    with pytest.raises(ConfigError, match="tolerance=1 was given; it must be 0 or more and below 1"):
        Shapley(tolerance=1)
