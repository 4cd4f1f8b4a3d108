"""Training sees what inference sees: identities of the passes, and gradients that come from the task."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from microglia.execution import Decision, Masked
from microglia.gate import Gate, keep_ratio
from microglia.passes import Batch, answer_logits, collate
from microglia.policies import AgentPolicy, StaticPolicy
from microglia.pruner import Pruner
from microglia.reading import read
from microglia.training import loop
from microglia.training.config import TrainingConfig
from microglia.training.loss import answer_losses, divergences, gate_entropy
from microglia.training.trained import ScheduleState, Trained
from microglia.units import find_sites
from tests.tiny import geometries_of, tiny_model, wild, wild_policy

ROWS = [
    {"prompt": [5, 6, 7, 8, 9, 10, 11, 12, 13], "answer": [20, 21, 22, 1]},
    {"prompt": [30, 31, 32], "answer": [40, 41, 42, 43, 44, 1]},
]
BATCH = Batch(**collate(ROWS))
COUNTED = BATCH.answer_mask.bool()


def test_two_passes_and_one_pass_give_the_same_numbers(family):
    model = tiny_model(family)
    pruner = wild(model)
    two, trace = answer_logits(model, BATCH, pruner)
    with ExitStack() as gates:
        whole, _ = answer_logits(model, BATCH, pruner, whole=gates)
    assert 0 < trace.keep_ratio.mean() < 1
    torch.testing.assert_close(two[COUNTED], whole[COUNTED], atol=2e-5, rtol=0)


def test_dense_is_the_model_itself(family):
    model = tiny_model(family)
    dense, trace = answer_logits(model, BATCH, None)
    kept, _ = answer_logits(model, BATCH, Pruner(StaticPolicy.all_kept(geometries_of(model))))
    alone = model(input_ids=torch.tensor([ROWS[1]["prompt"] + ROWS[1]["answer"][:-1]])).logits[0, 2:]
    torch.testing.assert_close(dense[1], alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(dense[COUNTED], kept[COUNTED], atol=2e-5, rtol=0)
    assert not trace.keep


def test_the_answer_never_reaches_the_decision():
    model = tiny_model("qwen2")
    pruner = wild(model)
    other = Batch(BATCH.prompt, BATCH.prompt_mask, BATCH.answer.roll(1, 1) + 3, BATCH.answer_mask)
    a, b = (answer_logits(model, batch, pruner)[1] for batch in (BATCH, other))
    for x, y in zip(a.features, b.features, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    assert all(x.equal(y) for x, y in zip(a.keep, b.keep, strict=True))


def test_features_are_those_of_generation():
    model = tiny_model("llama")
    pruner = wild(model)
    features = read(model, BATCH.prompt, BATCH.prompt_mask, pruner).features
    trained = answer_logits(model, BATCH, pruner)[1].features
    assert all(x.equal(y) for x, y in zip(features, trained, strict=True))


@pytest.mark.parametrize("mode", ["straight-through", "soft"])
def test_every_parameter_of_the_agents_gets_a_gradient(family, mode):
    model = tiny_model(family)
    model.requires_grad_(False)
    policy = AgentPolicy(geometries_of(model), hidden_dim=16)
    gate = Gate(mode, temperature=1.0, bucket=1, noise=0.5)
    logits, trace = answer_logits(model, BATCH, Pruner(policy, gate))
    loss = (
        answer_losses(logits, BATCH.labels).mean()
        + 0.1 * keep_ratio(trace.keep).mean()
        + 0.01 * gate_entropy(trace.logits, 1.0)
    )
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
    trained = Trained(model, Pruner(policy), TrainingConfig(estimator="soft", beta=0.0, target="gold")).train()
    with ExitStack() as gates:
        loss, _ = trained(ScheduleState(alpha=0.0, temperature=1.0, noise=0.0, target=None), gates, **vars(BATCH))
        loss.backward()

    def cross_entropy(logits):
        """Of both rows, each alone and unpadded, in one pass that is gated where the answer's tokens stand."""
        losses = []
        for row in ROWS:
            ids, prompt = torch.tensor([row["prompt"] + row["answer"][:-1]]), len(row["prompt"])
            keep = [torch.sigmoid(x)[None] for x in logits]
            answer = Masked(torch.arange(ids.shape[1])[None] >= prompt)
            with answer.apply(sites, Decision(keep)), torch.no_grad():
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
        loop.switch_checkpointing(model, "enable", {"use_reentrant": False})
        model.train()
    with ExitStack() as stack:
        whole = stack if checkpointing else None
        gate = Gate("straight-through", temperature=1.0)
        logits, trace = answer_logits(model, BATCH, Pruner(policy, gate), whole=whole)
        (answer_losses(logits, BATCH.labels) + 0.1 * keep_ratio(trace.keep)).mean().backward()
    optimizer.step()
    assert logits.dtype == torch.bfloat16
    for parameter, old in zip(policy.parameters(), before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.isfinite().all()
        assert not parameter.equal(old)


@pytest.mark.parametrize("loss_per", ["token", "example"])
def test_loss_and_price_are_weighed_by_the_same_tokens_or_by_none(loss_per):
    """A short and a long answer, against sums by hand: Σ nᵢ·xᵢ / Σ nᵢ, or the plain mean."""
    model = tiny_model("llama")
    pruner = wild(model, gate=Gate(bucket=1))
    rows = [ROWS[0], {"prompt": ROWS[1]["prompt"], "answer": ROWS[1]["answer"] * 3}]
    batch = Batch(**collate(rows))
    tokens = torch.tensor([float(len(row["answer"])) for row in rows])
    assert tokens[0] != tokens[1]
    config = TrainingConfig(estimator="soft", beta=0.0, target="0.25", loss_per=loss_per)
    with ExitStack() as gates, torch.no_grad():
        now = ScheduleState(alpha=2.0, temperature=1.0, noise=0.0, target=None)
        loss, parts = Trained(model, pruner, config).train()(now, gates, **vars(batch))
    soft = replace(pruner, gate=Gate("soft", temperature=1.0, bucket=1))
    with torch.no_grad():
        logits, trace = answer_logits(model, batch, soft)
        dense, _ = answer_logits(model, batch, None)
        kept = keep_ratio(trace.keep)
        assert (kept[0] - kept[1]).abs() > 1e-3
        each = [answer_losses(logits, batch.labels), kept, divergences(logits, dense, batch.labels)]
        weights = tokens if loss_per == "token" else torch.ones(2)
        task, price, divergence = (float((x * weights).sum() / weights.sum()) for x in each)
    assert float(parts["task"]) == pytest.approx(task, rel=1e-5)
    assert float(parts["keep_ratio"]) == pytest.approx(price, rel=1e-5)
    assert float(loss) == pytest.approx(0.75 * task + 2 * price + 0.25 * divergence, rel=1e-5)
