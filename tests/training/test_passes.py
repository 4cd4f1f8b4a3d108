"""Training sees what inference sees: identities of the passes, and gradients that come from the task."""

from contextlib import ExitStack

import pytest
import torch

from microglia.attach import gated
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import AgentPolicy, StaticPolicy
from microglia.sites import find_sites
from microglia.training import loop
from microglia.training.config import TrainingConfig
from microglia.training.data import Batch, Collator
from microglia.training.loss import gate_entropy, mean_keep, task_loss
from microglia.training.passes import answer_logits, prompt_features
from microglia.training.trained import Moment, Trained
from tests.tiny import tiny_model, wild_policy

ROWS = [
    {"prompt": [5, 6, 7, 8, 9, 10, 11, 12, 13], "answer": [20, 21, 22, 1]},
    {"prompt": [30, 31, 32], "answer": [40, 41, 42, 43, 44, 1]},
]
BATCH = Batch(**Collator(0)(ROWS))
HARD = Gate("hard", bucket=1)
COUNTED = BATCH.answer_mask.bool()


def test_two_passes_and_one_pass_give_the_same_numbers(family):
    model = tiny_model(family)
    policy = wild_policy(model)
    two, trace = answer_logits(model, BATCH, policy, gate=HARD, look=Look())
    with ExitStack() as gates:
        whole, _ = answer_logits(model, BATCH, policy, gate=HARD, look=Look(), whole=gates)
    assert 0 < trace.keep_ratio.mean() < 1
    torch.testing.assert_close(two[COUNTED], whole[COUNTED], atol=2e-5, rtol=0)


def test_dense_is_the_model_itself(family):
    model = tiny_model(family)
    dense, trace = answer_logits(model, BATCH, None, gate=HARD, look=Look())
    kept, _ = answer_logits(
        model, BATCH, StaticPolicy.all_kept([s.geometry for s in find_sites(model)]), gate=HARD, look=Look()
    )
    alone = model(input_ids=torch.tensor([ROWS[1]["prompt"] + ROWS[1]["answer"][:-1]])).logits[0, 2:]
    torch.testing.assert_close(dense[1], alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(dense[COUNTED], kept[COUNTED], atol=2e-5, rtol=0)
    assert not trace.keep


def test_the_answer_never_reaches_the_decision():
    model = tiny_model("qwen2")
    policy = wild_policy(model)
    other = Batch(BATCH.prompt, BATCH.prompt_mask, BATCH.answer.roll(1, 1) + 3, BATCH.answer_mask)
    for scope in ("answer", "all"):
        a = answer_logits(model, BATCH, policy, gate=HARD, look=Look(), scope=scope)[1]
        b = answer_logits(model, other, policy, gate=HARD, look=Look(), scope=scope)[1]
        for x, y in zip(a.features, b.features, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
        assert all(x.equal(y) for x, y in zip(a.keep, b.keep, strict=True))


def test_features_are_those_of_generation():
    model = tiny_model("llama")
    policy = wild_policy(model)
    features = prompt_features(model, BATCH, policy, Look())
    trained = answer_logits(model, BATCH, policy, gate=HARD, look=Look())[1].features
    assert all(x.equal(y) for x, y in zip(features, trained, strict=True))


@pytest.mark.parametrize("mode", ["straight-through", "soft"])
def test_every_parameter_of_the_agents_gets_a_gradient(family, mode):
    model = tiny_model(family)
    model.requires_grad_(False)
    policy = AgentPolicy([s.geometry for s in find_sites(model)], hidden_dim=16)
    gate = Gate(mode, temperature=1.0, bucket=1, noise=0.5)
    logits, trace = answer_logits(model, BATCH, policy, gate=gate, look=Look())
    loss = task_loss(logits, BATCH.labels) + 0.1 * mean_keep(trace.keep) + 0.01 * gate_entropy(trace.logits, 1.0)
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_the_gates_gradient_is_the_tasks_alone_without_alpha_and_beta(family):
    """What is trained, against a finite difference in one soft gate of the cross entropy of gated answers."""
    model = tiny_model(family)
    model.requires_grad_(False)
    sites = find_sites(model)
    policy = StaticPolicy([torch.full((s.geometry.heads,), 0.3) for s in sites])
    trained = Trained(model, policy, TrainingConfig(estimator="soft", beta=0.0), look=Look(), bucket=None).train()
    with ExitStack() as gates:
        loss, _ = trained(Moment(alpha=0.0, temperature=1.0, noise=0.0, target=None), gates, **vars(BATCH))
        loss.backward()

    def cross_entropy(logits):
        """Of both rows, each alone and unpadded, in one pass that is gated where the answer's tokens stand."""
        losses = []
        for row in ROWS:
            ids, prompt = torch.tensor([row["prompt"] + row["answer"][:-1]]), len(row["prompt"])
            keep = [torch.sigmoid(x)[None] for x in logits]
            with gated(sites, keep, where=torch.arange(ids.shape[1])[None] >= prompt), torch.no_grad():
                predicted = model(input_ids=ids).logits[0, prompt - 1 :].log_softmax(-1)
            losses += [-predicted[i, token] for i, token in enumerate(row["answer"])]
        return torch.stack(losses).mean()

    step = 5e-2  # in float32, in which padding is masked in every family; a smaller one would measure its rounding
    for head in (0, 5):
        near = []
        for sign in (1, -1):
            moved = [x.detach().clone() for x in policy.logits]
            moved[1][head] += sign * step
            near.append(cross_entropy(moved))
        difference = ((near[0] - near[1]) / (2 * step)).item()
        assert policy.logits[1].grad[head].item() == pytest.approx(difference, rel=2e-2, abs=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_agents_stay_in_float32_on_a_model_in_half_precision(checkpointing):
    """As on a GPU: the model as it is stored, agents and their gradients in float32, in one step or checkpointed."""
    model = tiny_model("llama", dtype=torch.bfloat16).requires_grad_(False)
    policy = wild_policy(model)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters())
    if checkpointing:
        loop.checkpointing(model, "enable", {"use_reentrant": False})
        model.train()
    with ExitStack() as stack:
        whole = stack if checkpointing else None
        gate = Gate("straight-through", temperature=1.0)
        logits, trace = answer_logits(model, BATCH, policy, gate=gate, look=Look(), whole=whole)
        (task_loss(logits, BATCH.labels) + 0.1 * mean_keep(trace.keep)).backward()
    optimizer.step()
    assert logits.dtype == torch.bfloat16
    for parameter, old in zip(policy.parameters(), before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.isfinite().all()
        assert not parameter.equal(old)
