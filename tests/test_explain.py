"""One prompt laid open: what is shown is what generation does, and every outcome says why."""

import json

import pytest
import torch

from microglia.attach import attached
from microglia.explain import explain
from microglia.gate import Gate
from microglia.generation import generate
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.units import find_sites
from tests.tiny import ONE, tiny_model, tiny_tokenizer, wild

PROMPT = "Question: What is 12 plus 30?\nAnswer:"


@pytest.fixture(scope="module")
def system():
    """A model, its tokenizer and a pruner that decides differently for every prompt."""
    model = tiny_model("llama")
    return model, tiny_tokenizer(), wild(model, gate=Gate())


def test_the_decision_shown_is_the_one_that_generation_makes(system):
    model, tokenizer, pruner = system
    stricter = pruner.with_threshold(4.0)
    shown = explain(model, tokenizer, PROMPT, stricter)
    done = generate(model, tokenizer, [PROMPT], stricter, max_new_tokens=2)
    assert [site.kept for site in shown.sites] == [[bool(k) for k in keep[0]] for keep in done.keep]
    for site, signals in zip(shown.sites, done.signals, strict=True):
        assert site.signals.keys() == {"norm", "entropy"}
        for name, values in site.signals.items():
            assert values == pytest.approx(signals[name][0].tolist(), abs=1e-5)
    assert shown.tokens == len(PROMPT)
    assert shown.keep_ratio < explain(model, tokenizer, PROMPT, pruner).keep_ratio
    assert shown.as_json()["keep_ratio"] == pytest.approx(1 - shown.as_json()["sparsity"])
    assert json.loads(json.dumps(shown.as_json()))["requested"] == shown.requested


def test_every_outcome_has_its_reason(system):
    model, tokenizer, _ = system
    heads = find_sites(model)[0].geometry.heads
    logits = torch.full((heads,), -1.0)
    logits[:3] = torch.tensor([3.0, 2.0, 1.0])
    policy = StaticPolicy([logits for _ in find_sites(model)])
    shown = explain(model, tokenizer, PROMPT, Pruner(policy, Gate(bucket=heads // 2)))
    for site in shown.sites:
        for logit, outcome, kept in zip(site.logit, site.outcome, site.kept, strict=True):
            assert kept == (outcome in ("kept", "kept to fill"))
            assert (logit > 0) == (outcome in ("kept", "displaced"))
    assert shown.requested == 3 * len(shown.sites)
    assert any("kept to fill" in site.outcome for site in shown.sites)
    assert not shown.sites[0].deviations
    assert not shown.sites[0].signals


def test_a_head_beyond_its_groups_share_is_displaced():
    model = tiny_model("qwen2", num_attention_heads=12, num_key_value_heads=3)
    logits = torch.tensor([5.0, 4, 3, -1, -1, -1, -1, -1, 1, -2, -3, -4])
    shown = explain(model, tiny_tokenizer(), PROMPT, Pruner(StaticPolicy([logits, logits]), ONE))
    for site in shown.sites:
        assert site.outcome[:4] == ["kept", "kept", "displaced", "pruned"]
        assert site.outcome[4:] == ["pruned"] * 4 + ["kept", "kept to fill", "pruned", "pruned"]
    assert shown.requested == 8


def test_deviations_count_in_standard_deviations_of_training(system):
    model, tokenizer, pruner = system
    with attached(model, pruner) as trace:
        model(**tokenizer(PROMPT, return_tensors="pt"), use_cache=True)
    pruner.policy.fit_statistics([torch.cat([x - 1, x - 3]) for x in trace.features])  # mean x - 2, deviation 1
    shown = explain(model, tokenizer, PROMPT, pruner)
    for site in shown.sites:
        assert site.deviations.keys() == {"norm", "entropy"}
        for values in site.deviations.values():
            assert values == pytest.approx([2.0] * len(values), abs=1e-3)
