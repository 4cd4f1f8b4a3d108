"""Bytes of a step, unit by unit, are what a cut model and its cache hold; and budgets in them."""

import pytest
import torch

from microglia.attach import attached
from microglia.errors import ConfigError
from microglia.gate import Gate
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.units import find_sites, step_costs
from microglia.units.kv import kv_bytes
from tests.tiny import tiny_prompts
from tests.units.many import KINDS, deep_model, shuffled, some


def read_bytes(model, sites):
    """Every weight that is left, by its own size; none of a sublayer whose forward is replaced."""
    gone = set()
    for site in sites:
        for half, module in enumerate(site.layer.halves):
            if "forward" in vars(module):
                for part in (module, *site.layer.norms_around(half)):
                    gone |= {id(p) for p in part.parameters()}
    left = {id(p): p.numel() * p.element_size() for p in model.parameters() if id(p) not in gone}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(left.values()) - (0 if head is table else (len(table) - 1) * table[0].numel() * table.element_size())


@pytest.mark.parametrize("units", [("head",), ("channel", "sublayer"), KINDS], ids="+".join)
def test_counted_bytes_are_those_of_the_cut_model(family, units):
    model = deep_model(family)
    pruner, (ids, _) = some(model, units=units), tiny_prompts(5)
    sites = pruner.sites(model)
    costs = step_costs(model, sites, batch=1, context=5)
    with torch.no_grad():
        dense = read_bytes(model, sites) + kv_bytes(model(ids, use_cache=True).past_key_values)
        with attached(model, pruner, "compact") as trace:
            cache = model(ids, use_cache=True).past_key_values
            cut = read_bytes(model, sites) + kv_bytes(cache)
    assert costs.whole == pytest.approx(dense, abs=1)
    assert float(costs.kept_bytes(trace.keep)) == pytest.approx(cut, abs=len(sites))
    assert float(costs.share([torch.ones_like(k) for k in trace.keep])) == pytest.approx(1)
    assert costs.fixed > 0


def test_keys_and_values_weigh_with_rows_and_context_up_to_the_window():
    model = deep_model("mistral")  # which sees seven tokens
    sites = find_sites(model)
    whole = [step_costs(model, sites, batch=b, context=c).whole for b, c in ((1, 0), (1, 4), (2, 4), (1, 99))]
    per_token = 5 * 2 * sites[0].geometry.kv_width * 4
    table = model.get_input_embeddings().weight[0].numel() * 4
    assert [w - whole[0] for w in whole[1:]] == [4 * per_token, 8 * per_token + table, 6 * per_token]
    with pytest.raises(ConfigError, match="batch=0 was given; it must be at least 1"):
        step_costs(model, sites, batch=0)


def budgeted(model, units=KINDS, prompts=6, **parts):
    """A pruner with random logits of several prompts, and what its units cost."""
    arrangement = shuffled(model, **parts)
    sites = find_sites(model, units, arrangement)
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(prompts, site.geometry.count, generator=generator) for site in sites]
    policy = StaticPolicy.all_kept([site.geometry for site in sites])
    pruner = Pruner(policy, Gate(bucket=1), units=tuple(units), arrangement=arrangement)
    return pruner.with_budget(logits, [site.geometry for site in sites], costs=step_costs(model, sites))


@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
def test_a_share_of_bytes_is_met_from_above(family, share):
    pruner = budgeted(deep_model(family))
    budget = pruner.budget
    threshold = pruner.at(byte_share=share).gate.threshold
    kept = budget.byte_share(threshold)
    values = torch.cat([x.flatten() for x in budget.logits]).sort().values
    more = float(values[values > threshold][0]) + 1e-4
    assert share - 1e-6 <= kept
    assert budget.byte_share(more) < share or kept < share + 0.03
    assert pruner.at(byte_share=share).gate.threshold == threshold


def test_impossible_budgets_say_what_is_possible():
    model = deep_model("llama")
    pruner = budgeted(model, ("channel",), shared=0.5)
    least = pruner.budget.byte_share(float("inf"))
    assert least > 0.5
    with pytest.raises(ConfigError, match=rf"bytes=0.1 was given; a step reads at most 1 and at least {least:.3f} of"):
        pruner.at(byte_share=0.1)
    with pytest.raises(ConfigError, match=r"bytes=1.5 was given; a step reads at most 1 and at least"):
        pruner.at(byte_share=1.5)
    with pytest.raises(ConfigError, match=r"bytes=0.9 was given beside keep_ratio=0.5; a budget is one of them"):
        pruner.at(0.5, byte_share=0.9)
    bare = pruner.with_budget(pruner.budget.logits, pruner.budget.geometries)
    with pytest.raises(ConfigError, match=r"bytes=0.9 was given, but what the model's units cost is not known here"):
        bare.at(byte_share=0.9)
    assert bare.with_costs(pruner.budget.costs).at(byte_share=0.95).gate == pruner.at(byte_share=0.95).gate
