"""Scores of channels and sublayers against slow sums over the answers' tokens, and the order that they make."""

import pytest
import torch

from microglia.criteria import CRITERIA, get_criterion, ordered_channels
from microglia.errors import ConfigError
from microglia.units import Arrangement
from tests.criteria.calibrated import LAYOUTS, calibration
from tests.criteria.test_every import quick
from tests.units.many import KINDS

ORDERS = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
WIDE = [torch.randperm(192, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def channels(family, **options):
    """A calibration of channels in a shuffled order, and at every site what they gave at answer tokens, (N, I)."""
    orders = WIDE if family == "gpt2" else ORDERS
    cal = calibration(family, units=("channel",), arrangement=Arrangement(orders), **options)
    seen = [[] for _ in cal.sites]
    for example in cal.examples:
        prompt = cal.tokenizer(example.question)["input_ids"]
        answer = cal.tokenizer(" " + example.answer)["input_ids"]
        handles = [
            site.output.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0][0].detach().double()))
            for site, rows in zip(cal.sites, seen, strict=True)
        ]
        with torch.no_grad():
            cal.lm(input_ids=torch.tensor([prompt + answer]))
        for handle, rows in zip(handles, seen, strict=True):
            handle.remove()
            rows[-1] = rows[-1][len(prompt) :]
    downs = [site.output.weight.detach().double() for site in cal.sites]
    downs = [w.T if family == "gpt2" else w for w in downs]
    blocks = [order.view(-1, site.geometry.block) for site, order in zip(cal.sites, orders, strict=True)]
    return cal, [torch.cat(rows) for rows in seen], downs, blocks


@pytest.mark.parametrize("family", LAYOUTS)
def test_scores_of_channels_are_what_slow_sums_say(family):
    cal, seen, downs, blocks = channels(family)
    scores = {name: get_criterion(name).scores(cal) for name in ("wanda", "fluctuation", "weight")}
    scores["norm"] = get_criterion("norm", projected=True).scores(cal)
    for index, (x, w, order) in enumerate(zip(seen, downs, blocks, strict=True)):
        mlp = cal.sites[index].holder
        ups = [getattr(mlp, name).weight.detach().double() for name in cal.sites[index].projections[:-1]]
        ups = [u.T if family == "gpt2" else u for u in ups]
        rows = torch.cat(ups).view(-1, x.shape[1], w.shape[0])  # gate and up, or the one that there is
        slow = {name: [] for name in scores}
        for block in order:
            slow["wanda"].append((w[:, block].abs() * x[:, block].norm(dim=0)).sum())
            slow["fluctuation"].append((x[:, block].var(0, correction=0) * w[:, block].pow(2).sum(0)).sum())
            slow["weight"].append((rows[:, block].pow(2).sum() + w[:, block].pow(2).sum()).sqrt())
            slow["norm"].append((x[:, block] @ w[:, block].T).norm(dim=-1).mean())
        truth = {name: torch.stack(values) for name, values in slow.items()}
        for name in ("wanda", "weight", "norm"):
            expected = truth[name] / truth[name].mean()
            torch.testing.assert_close(scores[name][index].double(), expected, atol=1e-4, rtol=1e-4)
        spread = truth["fluctuation"]
        expected = (spread - spread.mean()) / spread.std(correction=0)
        torch.testing.assert_close(scores["fluctuation"][index].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["random", "taylor", "static_baseline", "agents"])
def test_some_criteria_score_all_kinds_at_once(name):
    cal = calibration("qwen2", units=KINDS, num_hidden_layers=4)
    policy = quick(name).policy(cal)
    assert [len(x) for x in policy.logits] == [8] * 4 + [8] * 4 + [2] * 4


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_units_that_a_criterion_cannot_score_are_refused(name):
    criterion = CRITERIA[name]
    for units in [(kind,) for kind in KINDS] + [("head", "channel")]:
        if {*units} <= {*criterion.units} and (len(units) == 1 or criterion.together):
            continue
        with pytest.raises(ConfigError, match=f"units='{','.join(units)}' was given, but {name} scores .*; choose"):
            quick(name).policy(calibration(units=units))


@pytest.mark.parametrize("family", LAYOUTS)
def test_channels_are_ordered_by_what_each_adds_alone(family):
    cal, seen, downs, _ = channels(family)
    arrangement = ordered_channels(cal)
    for order, x, w in zip(arrangement.orders, seen, downs, strict=True):
        alone = (x.abs() * w.norm(dim=0)).mean(0)
        assert alone[order].diff().le(1e-6).all()
    runs = ordered_channels(cal, get_criterion("wanda"), run=4).orders[0].view(-1, 4)
    assert (runs[:, 0] % 4 == 0).all()
    assert runs.equal(runs[:, :1] + torch.arange(4))
    with pytest.raises(ConfigError, match="run=7 was given, but a layer has"):
        ordered_channels(cal, run=7)
