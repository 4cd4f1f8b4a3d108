"""One prompt laid open: what is shown is what generation does, and every outcome says why."""

import pytest
import torch

from microglia.attach import attached
from microglia.decision import decide
from microglia.gate import Gate
from microglia.generation import generate
from microglia.policy import AgentPolicy, StaticPolicy
from microglia.signals import split_features, stack_features
from microglia.units import find_sites
from tests.tiny import tiny_model
from tests.tiny_folder import LETTERS, SPECIAL, character_tokenizer, opinionated

PROMPT = "Question: What is 12 plus 30?\nAnswer:"


@pytest.fixture(scope="module")
def system():
    """A grouped-query model with agents that differ per prompt, and its tokenizer."""
    model = tiny_model("llama", vocab_size=len(SPECIAL) + len(LETTERS), max_position_embeddings=256, bos_token_id=None)
    policy = opinionated(AgentPolicy([s.geometry for s in find_sites(model)], hidden_dim=16))
    return model, character_tokenizer(), policy


def test_the_decision_shown_is_the_one_that_generation_makes(system):
    model, tokenizer, policy = system
    gate = Gate(threshold=1.0)
    shown = decide(model, tokenizer, PROMPT, policy, gate=gate)
    done = generate(model, tokenizer, [PROMPT], policy, gate=gate, max_new_tokens=2)
    assert [site.kept for site in shown.sites] == [[bool(k) for k in keep[0]] for keep in done.keep]
    for site, signals in zip(shown.sites, done.signals, strict=True):
        for name, values in site.signals.items():
            assert values == pytest.approx(signals[name][0].tolist(), abs=1e-5)
    assert shown.tokens == len(PROMPT)
    assert shown.keep_ratio < decide(model, tokenizer, PROMPT, policy).keep_ratio
    assert shown.as_json()["keep_ratio"] == pytest.approx(1 - shown.as_json()["sparsity"])


def test_every_outcome_has_its_reason(system):
    model, tokenizer, _ = system
    heads = find_sites(model)[0].geometry.heads
    logits = torch.full((heads,), -1.0)
    logits[:3] = torch.tensor([3.0, 2.0, 1.0])
    policy = StaticPolicy([logits for _ in find_sites(model)])
    shown = decide(model, tokenizer, PROMPT, policy, gate=Gate(bucket=heads // 2))
    for site in shown.sites:
        for logit, outcome, kept in zip(site.logit, site.outcome, site.kept, strict=True):
            assert kept == (outcome in ("kept", "kept to fill"))
            assert (logit > 0) == (outcome in ("kept", "crowded out"))
    assert shown.asked == 3 * len(shown.sites)
    assert any("kept to fill" in site.outcome for site in shown.sites)
    assert not shown.sites[0].unusual


def test_how_unusual_a_signal_is_counts_in_standard_deviations_of_training(system):
    model, tokenizer, policy = system
    with attached(model, policy) as trace:
        model(**tokenizer(PROMPT, return_tensors="pt"), use_cache=True)
    policy.fit_statistics([torch.cat([x - 1, x - 3]) for x in trace.features])  # mean x - 2, deviation 1
    shown = decide(model, tokenizer, PROMPT, policy)
    for site in shown.sites:
        for values in site.unusual.values():
            assert values == pytest.approx([2.0] * len(values), abs=1e-3)


@pytest.mark.parametrize("features", ["both", "norm", "entropy"])
def test_signals_are_what_features_were_made_of(features):
    signals = {"norm": torch.rand(2, 4), "entropy": torch.rand(2, 4)}
    split = split_features(stack_features(signals, features), features)
    assert all(torch.equal(split[name], signals[name]) for name in split)
    assert len(split) == (2 if features == "both" else 1)
