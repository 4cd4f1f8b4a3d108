"""Policies: shapes, standardisation, and a gradient for every parameter."""

import pytest
import torch

from microglia.agent import MicrogliaAgent
from microglia.gate import Gate
from microglia.geometry import HeadGeometry
from microglia.policy import AgentPolicy, Policy, StaticPolicy
from microglia.signals import feature_size

GEOMETRIES = [HeadGeometry(8, 4, 4), HeadGeometry(6, 6, 4)]


def random_features(kind, rows=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, feature_size(g.heads, kind), generator=generator) for g in GEOMETRIES]


@pytest.mark.parametrize("kind", ["both", "norm", "entropy"])
def test_agents_give_one_logit_per_head_of_each_site(kind):
    logits = AgentPolicy(GEOMETRIES, hidden_dim=16, features=kind)(random_features(kind))
    assert [tuple(x.shape) for x in logits] == [(5, 8), (5, 6)]


def test_agents_start_by_keeping_every_head():
    for logits, geometry in zip(AgentPolicy(GEOMETRIES)(random_features("both")), GEOMETRIES, strict=True):
        assert Gate()(logits, geometry).min() == 1


def test_an_agent_is_two_linear_layers():
    agent = MicrogliaAgent(heads=8, features=16)
    assert sum(p.numel() for p in agent.parameters()) == 16 * 128 + 128 + 128 * 8 + 8
    assert agent(torch.zeros(3, 16)).shape == (3, 8)


def test_features_are_standardised_with_the_statistics_of_training():
    policy = AgentPolicy(GEOMETRIES, hidden_dim=16)
    features = [7 + 3 * x for x in random_features("both", rows=50)]
    features[0][:, 3] = 5.0  # a feature that never moves must not divide by zero
    policy.fit_statistics(features)
    for index, x in enumerate(features):
        standard = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp(min=1e-6)
        torch.testing.assert_close(
            policy.site_logits(index, x), policy.agents[index](standard.float()), atol=1e-4, rtol=0
        )
        assert policy.site_logits(index, x).isfinite().all()


def test_agents_can_start_from_a_twin():
    policy, twin = AgentPolicy(GEOMETRIES, hidden_dim=16), [torch.randn(8), torch.randn(6)]
    policy.start_from(twin)
    assert all(agent.network[-1].bias.equal(x) for agent, x in zip(policy.agents, twin, strict=True))
    policy.start_from([5 * x for x in twin], limit=1.0)
    biases = torch.cat([agent.network[-1].bias for agent in policy.agents])
    assert biases.abs().max() == 1.0
    assert torch.equal(biases.sign(), torch.cat(twin).sign())


@pytest.mark.parametrize("make", [AgentPolicy, StaticPolicy.all_kept], ids=["agents", "static"])
def test_every_parameter_gets_a_gradient_through_the_gates(make):
    policy, gate = make(GEOMETRIES), Gate(mode="straight-through", temperature=1.0)
    logits = policy(random_features("both"))
    torch.manual_seed(0)
    sum((gate(x, g) * torch.randn(g.heads)).sum() for x, g in zip(logits, GEOMETRIES, strict=True)).backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_statistics_travel_with_the_weights():
    policy, other = AgentPolicy(GEOMETRIES), AgentPolicy(GEOMETRIES)
    policy.fit_statistics(random_features("both"))
    other.load_state_dict(policy.state_dict())
    features = random_features("both")
    assert all(a.equal(b) for a, b in zip(policy(features), other(features), strict=True))


def test_a_static_policy_says_the_same_for_every_prompt():
    policy = StaticPolicy.random(GEOMETRIES, seed=3)
    first, second = policy(random_features("both"))
    assert first.equal(first[:1].expand(5, -1))
    assert second.shape == (5, 6)
    assert first.equal(StaticPolicy.random(GEOMETRIES, seed=3)(random_features("both"))[0])


def test_a_policy_that_does_not_decide_says_so():
    with pytest.raises(NotImplementedError, match="Policy does not say how a site decides; define site_logits"):
        Policy()(random_features("both"))
