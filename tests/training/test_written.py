"""The loss of answers that are written in groups, against one pass at a time and a KL in float64 from whole logits."""

import pytest
import torch

from microglia.anatomy import headless, logits_of
from microglia.execution import Decision, Masked
from microglia.gate import Gate
from microglia.passes import Batch, answer_logits, collate
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.recovery import Recovery
from microglia.training import loss as losses
from microglia.training import written as module
from microglia.training.written import written
from microglia.units import find_sites
from tests.tiny import geometries_of, tiny_model, wild, wild_policy

ROWS = [
    {"prompt": [5, 6, 7, 8, 9, 10, 11, 12, 13], "answer": [20, 21, 22, 1]},
    {"prompt": [30, 31, 32], "answer": [40, 41, 42, 43, 44, 1]},
    {"prompt": [3, 4], "answer": [50]},
    {"prompt": [60, 61, 62, 63], "answer": [70, 71, 72]},
]
BATCH = Batch(**collate(ROWS))
TOKENS = BATCH.answer_mask.sum(1).float()
WEIGHTS = TOKENS / TOKENS.sum()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Several groups and several pieces of the output head."""
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 8)
    monkeypatch.setattr(losses, "POSITIONS", {"cpu": 3, "cuda": 3})


def moved(recovery):
    """A recovery that changes something everywhere."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in [*recovery.up, *recovery.norms]:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return recovery


def truth(model, keep, recovery, kl_weight):
    """Row by row, unpadded: a dense pass, and one that continues the dense prompt's cache with gates and recovery."""
    sites, total = find_sites(model), 0.0
    for index, row in enumerate(ROWS):
        ids, length = torch.tensor([row["prompt"] + row["answer"][:-1]]), len(row["prompt"])
        dense = model(input_ids=ids).logits[0, length - 1 :].double().log_softmax(-1)
        first = model(input_ids=ids[:, :length], use_cache=True)
        rest = first.logits[:, -1]
        if len(row["answer"]) > 1:
            with recovery.applied(model, merged=True), Masked().apply(sites, Decision([k[index][None] for k in keep])):
                output = model(input_ids=ids[:, length:], past_key_values=first.past_key_values, use_cache=True)
            rest = torch.cat([rest, output.logits[0]])
        predicted = rest.double().log_softmax(-1)
        kl = (dense.exp() * (dense - predicted)).sum()
        cross_entropy = -sum(predicted[i, token] for i, token in enumerate(row["answer"]))
        total += kl_weight * kl + (1 - kl_weight) * cross_entropy
    return float(total) / float(TOKENS.sum())


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_passes_made_one_by_one(family, kl_weight):
    model = tiny_model(family).requires_grad_(False)
    pruner = wild(model, recovery=moved(Recovery.for_model(model, 3)))
    with torch.no_grad():
        result = written(model, BATCH, pruner, WEIGHTS, kl_weight)
        expected = truth(model, result.trace.keep, pruner.recovery, kl_weight)
    assert 0 < float(torch.cat(result.trace.keep).mean()) < 1
    assert float(result.loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    combined = kl_weight * result.kl + (1 - kl_weight) * result.task
    assert float(result.loss) == pytest.approx(float(combined @ WEIGHTS), rel=1e-4)
    assert result.kl[2] == 0  # its only token was predicted by the dense model


def test_every_gradient_is_that_of_one_graph_over_the_whole_batch():
    model = tiny_model("qwen2").requires_grad_(False)
    gradients = []
    for way in ("in groups", "whole"):
        policy = wild_policy(model)
        gate = Gate("straight-through", temperature=1.0, bucket=1)
        pruner = Pruner(policy, gate, recovery=moved(Recovery.for_model(model, 3)))
        parameters = dict([*policy.named_parameters(), *pruner.recovery.named_parameters()])
        if way == "in groups":
            written(model, BATCH, pruner, WEIGHTS, 1.0).loss.backward()
        else:
            with torch.no_grad():
                dense, _ = answer_logits(model, BATCH, None)
            logits, _ = answer_logits(model, BATCH, pruner)
            (losses.divergences(logits, dense, BATCH.labels) @ WEIGHTS).backward()
        gradients.append({name: p.grad for name, p in parameters.items()})
    for name, grouped in gradients[0].items():
        torch.testing.assert_close(grouped, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["straight-through", "soft"])
def test_every_parameter_gets_a_gradient(family, mode):
    model = tiny_model(family).requires_grad_(False)
    policy = AgentPolicy(geometries_of(model), hidden_dim=16)
    recovery = moved(Recovery.for_model(model, 3))
    gate = Gate(mode, temperature=1.0, bucket=1, noise=0.5)
    written(model, BATCH, Pruner(policy, gate, recovery=recovery), WEIGHTS, 1.0).loss.backward()
    for name, parameter in [*policy.named_parameters(), *recovery.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_means_of_pruned_heads_reach_the_answers():
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        result = written(model, BATCH, wild(model, fill="mean"), WEIGHTS, 0.0)
        logits, _ = answer_logits(model, BATCH, wild(model, fill="mean"))
        zero = written(model, BATCH, wild(model), WEIGHTS, 0.0)
    assert float(result.loss) == pytest.approx(float(losses.answer_losses(logits, BATCH.labels) @ WEIGHTS), rel=1e-4)
    assert float(result.loss) != pytest.approx(float(zero.loss), rel=1e-4)


def test_final_states_give_the_models_own_logits(family):
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model = tiny_model(family, **changes)
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), headless(model) as states:
        empty = model(input_ids=ids).logits
    with torch.no_grad():
        assert logits_of(model, states[0]).equal(model(input_ids=ids).logits)
    assert empty.shape[1] == 0
