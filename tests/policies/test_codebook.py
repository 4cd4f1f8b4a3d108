"""A codebook: one hard choice per prompt, which all sites follow, in every execution, on disk and in an export."""

from dataclasses import replace

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.checkpoint import Checkpoint
from microglia.errors import ConfigError
from microglia.execution import Captured
from microglia.export import KeepPlan
from microglia.gate import Gate, rows_agree
from microglia.generation import generate
from microglia.policies import CodebookPolicy, StaticPolicy
from microglia.policies.codebook import clusters
from microglia.pruner import Pruner
from microglia.reading import read_prompts
from microglia.signals import feature_size
from tests.tiny import geometries_of, pruner_of, tiny_model, tiny_tokenizer

GEOMETRIES = [HeadGeometry(8, 4, 4), HeadGeometry(6, 6, 4)]
PROMPTS = ["abcdefgh", "12+34=?", "Zebra!", "(x-y)*z", "qrstuvwxyz", "Seven?"]
LENGTH = {"max_new_tokens": 8}


def features(rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, feature_size(g, ("norm", "entropy")), generator=generator) for g in GEOMETRIES]


def told_apart(policy, seed=0):
    """Random masks in place of those that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in policy.agents:
            site.masks.copy_(torch.randn(site.masks.shape, generator=generator))
    return policy


def codebook(model, masks=3):
    """A pruner with a codebook whose masks each have some of PROMPTS."""
    policy = CodebookPolicy(geometries_of(model), hidden_dim=masks)
    read = read_prompts(model, tiny_tokenizer(), PROMPTS, pruner_of(policy))
    policy.fit_statistics(read.features)
    return pruner_of(told_apart(policy).eval())


def test_all_sites_follow_the_choice_of_one_product():
    policy, given = told_apart(CodebookPolicy(GEOMETRIES, hidden_dim=5)), features()
    policy.fit_statistics(given)
    every = torch.cat([policy.standardised(i, x) for i, x in enumerate(given)], -1)
    chosen = (every.double() @ policy.router.weight.double().T + policy.router.bias.double()).argmax(-1)
    assert len(chosen.unique()) == 5
    assert policy.choices(given).equal(chosen)
    for logits, masks in zip(policy(given), policy.masks, strict=True):
        assert logits.equal(masks[chosen])
    with torch.no_grad():
        policy.router.bias[2] += 1e6  # and no site has a will of its own
    assert all(logits.equal(masks[2].expand(40, -1)) for logits, masks in zip(policy(given), policy.masks, strict=True))


def test_the_choice_is_hard_and_its_gradient_the_softmax_of_the_router():
    policy, given = told_apart(CodebookPolicy(GEOMETRIES, hidden_dim=3)), features()
    policy.fit_statistics(given)
    weights = [torch.randn(40, g.heads, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(GEOMETRIES)]
    sum((x * w).sum() for x, w in zip(policy(given), weights, strict=True)).backward()
    hard = torch.nn.functional.one_hot(policy.choices(given), 3).float()
    for site, w in zip(policy.agents, weights, strict=True):  # a mask learns from its own prompts
        torch.testing.assert_close(site.masks.grad, 5 * hard.T @ w)
        assert site.masks.grad.abs().sum(-1).min() > 0
    found = policy.router.weight.grad.clone()
    policy.zero_grad()
    every = torch.cat([policy.standardised(i, x) for i, x in enumerate(given)], -1)
    soft = policy.router(every).softmax(-1)
    sum(((soft @ m.detach()) * w).sum() for m, w in zip(policy.masks, weights, strict=True)).backward()
    torch.testing.assert_close(found, policy.router.weight.grad)


def test_every_mask_begins_with_the_prompts_of_a_cluster():
    centres = 20 * torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    member = torch.arange(80) % 4
    points = centres[member] + torch.randn(80, 6, generator=torch.Generator().manual_seed(6))
    found = torch.cdist(clusters(points, 4), centres).argmin(-1)
    assert sorted(found.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(
        clusters(points, 4)[found.argsort()], torch.stack([points[member == k].mean(0) for k in range(4)])
    )
    assert clusters(points[:2], 4).shape == (4, 6)
    policy, given = CodebookPolicy(GEOMETRIES, hidden_dim=8), features()
    policy.fit_statistics(given)
    every = torch.cat([policy.standardised(i, x) for i, x in enumerate(given)], -1)
    assert policy.choices(given).equal(torch.cdist(every, clusters(every, 8)).argmin(-1))
    assert policy.choices(given).bincount(minlength=8).min() > 0
    before = policy.router.weight.clone()
    told_apart(policy).fit_statistics(features(seed=9))  # a router that has learned is left alone
    assert policy.router.weight.equal(before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_masked_is_compact_is_captured(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    pruner = codebook(model)
    masked = generate(model, tokenizer, PROMPTS, pruner, execution="masked", **LENGTH)
    assert not rows_agree(masked.keep)
    for execution in ("compact", Captured(model, block=1)):
        other = generate(model, tokenizer, PROMPTS, pruner, execution=execution, **LENGTH)
        assert other.tokens.equal(masked.tokens)
        assert all(a.equal(b) for a, b in zip(other.keep, masked.keep, strict=True))


def test_prompts_of_one_mask_share_cut_weights():
    """Batches by mask: rows agree, so compact execution takes the heads out of the weights."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pruner = codebook(model)
    whole = generate(model, tokenizer, PROMPTS, pruner, execution="masked", **LENGTH)
    chosen = pruner.policy.choices(read_prompts(model, tokenizer, PROMPTS, pruner).features)
    assert len(chosen.unique()) == 3
    for mask in chosen.unique():
        rows = (chosen == mask).nonzero().flatten().tolist()
        part = generate(model, tokenizer, [PROMPTS[i] for i in rows], pruner, **LENGTH)
        assert rows_agree(part.keep)
        assert part.texts == [whole.texts[i] for i in rows]


def test_saved_and_loaded_says_the_same(tmp_path):
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    pruner = codebook(model)
    Checkpoint.of(model, pruner).save_pretrained(tmp_path)
    loaded = Checkpoint.from_pretrained(tmp_path).pruner
    assert loaded.policy.options() == {"hidden_dim": 3}
    before, after = (generate(model, tokenizer, PROMPTS, one, **LENGTH) for one in (pruner, loaded))
    assert before.tokens.equal(after.tokens)
    assert all(a.equal(b) for a, b in zip(before.keep, after.keep, strict=True))


def test_plan_k_is_what_the_prompts_of_mask_k_get():
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    pruner = codebook(model)
    read = read_prompts(model, tokenizer, PROMPTS, pruner)
    pruner = pruner.with_budget(read.logits, geometries_of(model)).at(0.6)
    chosen = pruner.policy.choices(read.features)
    for mask in range(3):
        plan = KeepPlan.of_mask(pruner, mask)
        routed = [PROMPTS[i] for i in (chosen == mask).nonzero().flatten().tolist()]
        assert (plan.prompts, plan.kind) == (len(routed), "codebook")
        adaptive = generate(model, tokenizer, routed, pruner, **LENGTH)
        assert all(k.equal(p.expand_as(k)) for k, p in zip(adaptive.keep, plan.keep, strict=True))
        frozen = Pruner(StaticPolicy([2 * k - 1 for k in plan.keep]), Gate(bucket=1))
        assert generate(model, tokenizer, routed, frozen, **LENGTH).tokens.equal(adaptive.tokens)
    with pytest.raises(ConfigError, match=r"mask=3 was given; this codebook has the masks 0 to 2, give one"):
        KeepPlan.of_mask(pruner, 3)
    with pytest.raises(ConfigError, match=r"one mask of a codebook, but this policy is 'static'"):
        KeepPlan.of_mask(frozen, 0)
    with pytest.raises(ConfigError, match=r"needs the calibration prompts of training, but there are none"):
        KeepPlan.of_mask(replace(pruner, budget=None), 0)
