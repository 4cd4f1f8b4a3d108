"""Policies: shapes, standardisation, and a gradient for every parameter."""

import pytest
import torch

from microglia.agent import MaskMixture, MicrogliaAgent
from microglia.errors import ConfigError
from microglia.gate import Gate
from microglia.geometry import HeadGeometry
from microglia.policy import AgentPolicy, MixturePolicy, Policy, StaticPolicy, new_agents
from microglia.signals import feature_size

GEOMETRIES = [HeadGeometry(8, 4, 4), HeadGeometry(6, 6, 4)]


def random_features(kind, rows=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, feature_size(g.heads, kind), generator=generator) for g in GEOMETRIES]


AGENTS = [AgentPolicy, MixturePolicy]


@pytest.mark.parametrize("kind", ["both", "norm", "entropy"])
@pytest.mark.parametrize("policy", AGENTS)
def test_agents_give_one_logit_per_head_of_each_site(policy, kind):
    logits = policy(GEOMETRIES, hidden_dim=16, features=kind)(random_features(kind))
    assert [tuple(x.shape) for x in logits] == [(5, 8), (5, 6)]


@pytest.mark.parametrize("policy", AGENTS)
def test_agents_start_by_keeping_every_head(policy):
    for logits, geometry in zip(policy(GEOMETRIES)(random_features("both")), GEOMETRIES, strict=True):
        assert Gate()(logits, geometry).min() == 1


@pytest.mark.parametrize(("kind", "policy", "usual"), [("agents", AgentPolicy, 128), ("mixture", MixturePolicy, 16)])
def test_agents_are_made_by_the_name_of_their_kind(kind, policy, usual):
    made, told = new_agents(kind, GEOMETRIES), new_agents(kind, GEOMETRIES, hidden_dim=4, features="norm")
    assert type(made) is policy
    assert (made.hidden_dim, told.hidden_dim, told.features) == (usual, 4, "norm")
    with pytest.raises(ConfigError, match="policy='gru' is unknown; choose agents or mixture"):
        new_agents("gru", GEOMETRIES)


def test_a_mixture_lies_between_its_masks_and_the_prompt_says_where():
    agent = MaskMixture(heads=2, features=3, masks=2)
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


def test_a_mixture_sees_every_site_and_so_cannot_decide_site_by_site():
    policy, features = MixturePolicy(GEOMETRIES), random_features("both")
    with torch.no_grad():
        policy.agents[0].masks.normal_()
    before = policy(features)[0]
    assert not before.equal(policy([features[0], features[1] + 1])[0])
    policy.check_scope("answer")
    with pytest.raises(ConfigError, match="a mixture sees every site before it decides; use scope='answer'"):
        policy.check_scope("all")
    with pytest.raises(ConfigError, match="a mixture sees every site before it decides; ask for all sites"):
        policy.site_logits(0, features[0])


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


@pytest.mark.parametrize("policy", AGENTS)
def test_agents_can_start_from_a_twin(policy):
    policy, twin = policy(GEOMETRIES, hidden_dim=16), [torch.randn(8), torch.randn(6)]
    for agent in policy.agents:
        if hasattr(agent, "network"):
            torch.nn.init.zeros_(agent.network[-1].weight)  # what an MLP adds, small at the start
    policy.start_from(twin)
    torch.testing.assert_close([x[0] for x in policy(random_features("both"))], twin)
    policy.start_from([5 * x for x in twin], limit=1.0)
    started = torch.cat([x[0] for x in policy(random_features("both"))])
    torch.testing.assert_close(started, (5 * torch.cat(twin)).clamp(-1, 1))


@pytest.mark.parametrize("make", [*AGENTS, StaticPolicy.all_kept], ids=["agents", "mixture", "static"])
def test_every_parameter_gets_a_gradient_through_the_gates(make):
    policy, gate = make(GEOMETRIES), Gate(mode="straight-through", temperature=1.0)
    logits = policy(random_features("both"))
    torch.manual_seed(0)
    sum((gate(x, g) * torch.randn(g.heads)).sum() for x, g in zip(logits, GEOMETRIES, strict=True)).backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("policy", AGENTS)
def test_statistics_travel_with_the_weights(policy):
    policy, other = policy(GEOMETRIES), policy(GEOMETRIES)
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
