"""Signals of channels and sublayers and the conflict of heads, against slow sums in float64."""

import pytest
import torch

from microglia.attach import attached
from microglia.gate import Gate
from microglia.policies import MixturePolicy
from microglia.pruner import Pruner
from microglia.signals import SIGNALS, usual_signals
from microglia.units import find_sites
from tests.tiny import positions, tiny_prompts
from tests.units.many import KINDS, deep_model, shuffled

IDS, MASK = tiny_prompts(14, 9, 3)
NAMES = ("conflict", "activation", "contribution", "cosine")


def weight_of(projection, family):
    weight = projection.weight.detach().double()
    return weight.T if family == "gpt2" else weight


@pytest.fixture
def seen(family):
    """What a dense pass over the prompts shows: signals, sites, inputs of projections, residual streams."""
    model = deep_model(family)
    arrangement = shuffled(model)
    sites = find_sites(model, KINDS, arrangement)
    policy = MixturePolicy([site.geometry for site in sites], signals=NAMES)
    inputs, streams, handles = {}, {}, []
    for site in sites:
        if site.unit != "sublayer":
            handles.append(
                site.output.register_forward_pre_hook(lambda _, x, i=site.index: inputs.update({i: x[0].double()}))
            )
            continue
        parts = streams.setdefault(site.index, [])
        layer = site.layer
        handles.append(
            layer.module.register_forward_pre_hook(
                lambda _, a, k, p=parts: p.append((a[0] if a else k["hidden_states"]).double()), with_kwargs=True
            )
        )
        for module in layer.contributions:
            handles.append(
                module.register_forward_hook(
                    lambda _, __, y, p=parts: p.append(p[-1] + (y[0] if isinstance(y, tuple) else y).double())
                )
            )
    pruner = Pruner(policy, Gate(), units=KINDS, arrangement=arrangement)
    with torch.no_grad(), attached(model, pruner, "dense") as trace:
        model(input_ids=IDS, attention_mask=MASK, position_ids=positions(MASK), use_cache=True)
    for handle in handles:
        handle.remove()
    return trace.signals, sites, inputs, streams


def test_signals_of_every_kind_are_what_slow_sums_say(family, seen):
    signals, sites, inputs, streams = seen
    for site in sites:
        values = signals[site.index]
        for row in range(3):
            tokens = MASK[row].bool()
            if site.unit == "sublayer":
                x, a, m = (part[row, tokens] for part in streams[site.index])
                for half, (before, after) in enumerate(((x, a), (a, m))):
                    truth = torch.cosine_similarity(before, after, dim=-1).mean()
                    assert values["cosine"][row, half] == pytest.approx(float(truth), abs=1e-4)
                continue
            x, w = inputs[site.index][row, tokens], weight_of(site.output, family)
            if site.unit == "head":
                parts = torch.stack([x[:, c] @ w[:, c].T for c in torch.arange(x.shape[1]).chunk(site.geometry.heads)])
                for head in range(site.geometry.heads):
                    rest = parts.sum(0) - parts[head]
                    truth = torch.cosine_similarity(parts[head], rest, dim=-1).mean()
                    assert values["conflict"][row, head] == pytest.approx(float(truth), abs=1e-3)
                continue
            order = site.order.view(-1, site.geometry.block)
            for block, channels in enumerate(order):
                share = (x[:, channels].norm(dim=-1) / x.norm(dim=-1)).pow(2).mean().sqrt()
                assert values["activation"][row, block] == pytest.approx(float(share), rel=1e-3)
                written = (x[:, channels] * w[:, channels].norm(dim=0)).pow(2).sum(-1).mean().sqrt()
                assert values["contribution"][row, block] == pytest.approx(float(written), rel=1e-3)


def test_what_agents_see_unless_they_are_told_otherwise():
    assert usual_signals(("head",)) == ("norm", "entropy")
    assert usual_signals(KINDS) == ("norm", "entropy", "activation", "contribution", "cosine")
    assert SIGNALS["cosine"].score(torch.tensor([0.9])).item() == pytest.approx(0.1)
