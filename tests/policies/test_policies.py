"""Policies: shapes, standardisation, and a gradient for every parameter."""

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.gate import Gate
from microglia.policies import (
    POLICIES,
    AgentPolicy,
    CodebookPolicy,
    MaskMixture,
    MicrogliaAgent,
    MixturePolicy,
    Policy,
    PredictorPolicy,
    SignalPolicy,
    SitewisePolicy,
    StaticPolicy,
    new_agents,
)
from microglia.policies.base import MOST_DEVIATIONS, Standardiser
from microglia.signals import feature_size

BOTH = ("norm", "entropy")
GEOMETRIES = [HeadGeometry(8, 4, 4), HeadGeometry(6, 6, 4)]


def random_features(signals=BOTH, rows=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, feature_size(g, signals), generator=generator) for g in GEOMETRIES]


AGENTS = [AgentPolicy, MixturePolicy, CodebookPolicy]


@pytest.mark.parametrize("signals", [BOTH, ("norm",), ("entropy",)], ids="+".join)
@pytest.mark.parametrize("policy", [*AGENTS, PredictorPolicy])
def test_agents_give_one_logit_per_head_of_each_site(policy, signals):
    logits = policy(GEOMETRIES, hidden_dim=16, signals=signals)(random_features(signals))
    assert [tuple(x.shape) for x in logits] == [(5, 8), (5, 6)]


@pytest.mark.parametrize("policy", AGENTS)
def test_agents_start_by_keeping_every_head(policy):
    for logits, geometry in zip(policy(GEOMETRIES)(random_features()), GEOMETRIES, strict=True):
        assert Gate()(logits, geometry).min() == 1


KINDS = [("agents", AgentPolicy, 128), ("mixture", MixturePolicy, 16), ("codebook", CodebookPolicy, 8)]


@pytest.mark.parametrize(("kind", "policy", "usual"), KINDS)
def test_agents_are_made_by_the_name_of_their_kind(kind, policy, usual):
    made, small = new_agents(kind, GEOMETRIES), new_agents(kind, GEOMETRIES, hidden_dim=4, signals=("norm",))
    assert type(made) is type(small) is policy
    assert (made.hidden_dim, small.hidden_dim, small.signals) == (usual, 4, ("norm",))
    with pytest.raises(ConfigError, match="policy='gru' is unknown; choose agents, mixture, codebook or layers"):
        new_agents("gru", GEOMETRIES)


def test_a_mixture_lies_between_its_masks_and_the_prompt_says_where():
    agent = MaskMixture(units=2, features=3, masks=2)
    with torch.no_grad():
        agent.masks.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        agent.router.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        agent.router.bias.zero_()
    share = 1 / (1 + torch.tensor(-2.0).exp())  # softmax of (2, 0)
    logits = agent(torch.tensor([[2.0, 0.0, 9.0], [0.0, 0.0, 0.0], [0.0, 50.0, 0.0]]))
    wanted = (
        torch.tensor([[1.0, -1.0]]) * torch.stack([5 * (2 * share - 1), torch.tensor(0.0), torch.tensor(-5.0)])[:, None]
    )
    torch.testing.assert_close(logits, wanted)


def test_a_mixture_decides_on_a_site_from_the_features_of_every_site():
    policy, features = MixturePolicy(GEOMETRIES), random_features()
    with torch.no_grad():
        policy.agents[0].masks.normal_()
    before = policy(features)[0]
    assert not before.equal(policy([features[0], features[1] + 1])[0])
    assert not isinstance(policy, SitewisePolicy)


def test_agents_decide_on_a_site_from_its_features_alone():
    policy, features = AgentPolicy(GEOMETRIES, hidden_dim=16), random_features()
    before, after = policy(features), policy([features[0], features[1] + 1])
    assert before[0].equal(after[0])
    assert not before[1].equal(after[1])


def test_an_agent_is_two_linear_layers():
    agent = MicrogliaAgent(units=8, features=16)
    assert sum(p.numel() for p in agent.parameters()) == 16 * 128 + 128 + 128 * 8 + 8
    assert agent(torch.zeros(3, 16)).shape == (3, 8)


def test_features_are_standardised_with_the_statistics_of_training():
    policy = AgentPolicy(GEOMETRIES, hidden_dim=16)
    features = [7 + 3 * x for x in random_features(rows=50)]
    features[0][:, 3] = 5.0  # a feature that never moves must not divide by zero
    policy.fit_statistics(features)
    logits = policy(features)
    for index, x in enumerate(features):
        standard = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp(min=1e-6)
        torch.testing.assert_close(policy.standardised(index, x), standard.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[index], policy.agents[index](standard.float()), atol=1e-4, rtol=0)
        assert logits[index].isfinite().all()


@pytest.mark.parametrize("policy", AGENTS)
def test_agents_can_start_from_a_static_baseline(policy):
    policy, baseline = policy(GEOMETRIES, hidden_dim=16), [torch.randn(8), torch.randn(6)]
    for agent in policy.agents:
        if hasattr(agent, "network"):
            torch.nn.init.zeros_(agent.network[-1].weight)  # what an MLP adds, small at the start
    policy.start_from(baseline)
    torch.testing.assert_close([x[0] for x in policy(random_features())], baseline)
    policy.start_from([5 * x for x in baseline], limit=1.0)
    started = torch.cat([x[0] for x in policy(random_features())])
    torch.testing.assert_close(started, (5 * torch.cat(baseline)).clamp(-1, 1))


@pytest.mark.parametrize("make", [*AGENTS, StaticPolicy.all_kept], ids=["agents", "mixture", "codebook", "static"])
def test_every_parameter_gets_a_gradient_through_the_gates(make):
    policy, gate = make(GEOMETRIES), Gate(mode="straight-through", temperature=1.0)
    logits = policy(random_features())
    torch.manual_seed(0)
    sum((gate(x, g) * torch.randn(g.heads)).sum() for x, g in zip(logits, GEOMETRIES, strict=True)).backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("policy", AGENTS)
def test_statistics_travel_with_the_weights(policy):
    policy, other = policy(GEOMETRIES), policy(GEOMETRIES)
    policy.fit_statistics(random_features())
    other.load_state_dict(policy.state_dict())
    features = random_features()
    assert all(a.equal(b) for a, b in zip(policy(features), other(features), strict=True))


def test_a_static_policy_says_the_same_for_every_prompt():
    policy = StaticPolicy.random(GEOMETRIES, seed=3)
    first, second = policy(random_features())
    assert first.equal(first[:1].expand(5, -1))
    assert second.shape == (5, 6)
    assert first.equal(StaticPolicy.random(GEOMETRIES, seed=3)(random_features())[0])


def test_a_static_policy_needs_no_signals():
    policy = POLICIES["static"].create(GEOMETRIES, BOTH)
    assert policy.signals == ()
    assert [tuple(x.shape) for x in policy([torch.zeros(5, 0), torch.zeros(5, 0)])] == [(5, 8), (5, 6)]


@pytest.mark.parametrize("signal", BOTH)
def test_a_signal_policy_ranks_heads_as_its_signal_does(signal):
    policy, values = POLICIES["signal"].create(GEOMETRIES, (signal,)), torch.tensor([[1.0, 3.0, 2.0]])
    expected = values / 2 if signal == "norm" else 1 - values
    torch.testing.assert_close(policy([values]), [expected])
    assert policy.signals == (signal,)


@pytest.mark.parametrize("signals", [BOTH, (), ("loudness",)], ids="+".join)
def test_a_signal_policy_of_anything_but_one_signal_is_refused(signals):
    with pytest.raises(ConfigError, match=f"signals='{','.join(signals)}' is not one signal; choose norm, entropy, "):
        SignalPolicy.create(GEOMETRIES, signals)


def test_a_predictor_reads_the_first_site_only():
    policy, features = PredictorPolicy(GEOMETRIES, hidden_dim=16), random_features()
    policy.fit_statistics(features)
    torch.nn.init.normal_(policy.agent.last.weight)
    before = policy(features)
    assert all(a.equal(b) for a, b in zip(before, policy([features[0], features[1] + 1]), strict=True))
    after = policy([features[0] + 1, features[1]])
    assert not any(a.equal(b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["agents", "mixture", "codebook", "static", "signal", "predictor"])
def test_a_policy_made_again_from_its_name_signals_and_options_is_the_same(name):
    signals = ("norm",) if name == "signal" else BOTH
    first = POLICIES[name].create(GEOMETRIES, signals)
    first.fit_statistics(random_features(signals))
    again = POLICIES[first.name].create(GEOMETRIES, first.signals, **first.options())
    again.load_state_dict(first.state_dict())
    features = random_features(signals)
    assert all(a.equal(b) for a, b in zip(first(features), again(features), strict=True))
    assert first.fingerprint() == again.fingerprint()
    assert first.describes


def test_policies_with_other_signals_are_told_apart():
    state = AgentPolicy(GEOMETRIES, signals=("norm",)).state_dict()
    prints = set()
    for signals in (("norm",), ("entropy",)):
        policy = AgentPolicy(GEOMETRIES, signals=signals)
        policy.load_state_dict(state)
        prints.add(policy.fingerprint())
    assert len(prints) == 2


def test_a_signal_that_hardly_varies_makes_no_outliers():
    """A hundredth of a thousandth about 5 is rounding; a little more of it must not look like 14 deviations."""
    standardiser = Standardiser(3)
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    standardiser.fit(torch.cat([5 + 1e-5 * noise, -5 + 1e-5 * noise, 5 + noise], -1))
    z = standardiser(torch.tensor([[5 + 2e-4, -5 - 2e-4, 5.0], [5, -5, 1e6]]))
    assert z[0].abs().max() < 0.5
    assert z[1, 2] == MOST_DEVIATIONS  # no prompt is further away than any network has learned about
    assert standardiser(torch.tensor([[5.0, -5.0, 6.0]]))[0, 2] == pytest.approx(1, abs=0.3)


def test_a_policy_that_does_not_decide_cannot_be_made():
    class Undecided(Policy):
        name = "undecided"

    with pytest.raises(TypeError, match=r"abstract methods? .*create.*forward"):
        Undecided()
