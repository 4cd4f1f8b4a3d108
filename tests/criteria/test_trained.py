"""Criteria that learn: each rule against values worked in another way, after one step or none."""

from dataclasses import replace

import pytest
import torch

from microglia.criteria.descent import turns
from microglia.criteria.expert import Expert, usage
from microglia.criteria.lora_gradient import LoraGradient, adapted, adapter, slope
from microglia.criteria.movement import Movement
from microglia.criteria.variational import Variational, divergence
from microglia.errors import ConfigError
from microglia.gate import Gate
from microglia.policy import AgentPolicy
from microglia.sites.layouts import plain
from microglia.training.loop import train
from tests.criteria.calibrated import LAYOUTS, Sums, calibration, one_pass_losses
from tests.criteria.test_static import HEAD, by_hand, oriented
from tests.criteria.test_static_baseline import SHORT


def test_batches_take_turns():
    cal = calibration(batch_size=3)
    taken = [(done, next(i for i, b in enumerate(cal.batches) if b is batch)) for done, batch in turns(cal, 4)]
    assert taken == [(0, 0), (0.25, 1), (0.5, 0), (0.75, 1)]


# --- variational -----------------------------------------------------------------------------------------------------


def test_the_divergence_is_the_least_over_priors():
    mean, spread = torch.tensor([[0.8, -0.2, 0.0]]), torch.tensor([[0.3, 0.5, 0.1]])
    priors = torch.linspace(0.05, 3, 40_001)[:, None]
    kl = (priors / spread).log() + (spread**2 + mean**2) / (2 * priors**2) - 0.5
    assert divergence([mean], [spread.log()]).item() == pytest.approx(kl.min(0).values.mean().item(), abs=1e-6)


def test_a_gate_starts_open_and_its_noise_grows_where_nothing_is_said():
    cal = calibration("qwen2")
    with torch.no_grad():
        cal.lm.model.layers[1].self_attn.o_proj.weight[:, 12:18] = 0  # head 2
    torch.manual_seed(0)
    first, second = Variational(steps=30, weight=1e-9).scores(cal)
    assert second[2].item() == pytest.approx(100, rel=0.05)  # μ = 1, σ = 0.1, as it started
    assert all(x != pytest.approx(100, rel=0.05) for x in [*first, *second[:2], *second[3:]])
    _, pressed = Variational(steps=30, weight=1.0).scores(cal)
    assert pressed[2] < 30


# --- movement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_first_move_is_minus_gradient_times_weight(family):
    cal = calibration(family)
    moved = Movement(steps=1).scores(cal)
    for site in cal.sites:
        weight = plain(site.output).weight
        gradient = torch.autograd.grad(cal.losses(cal.batches[0]).mean(), weight)[0]
        columns = oriented(type("", (), {"weight": gradient * weight} | ({"nf": 1} if family == "gpt2" else {})))
        expected = [-columns[:, h * HEAD : h * HEAD + HEAD].sum() for h in range(8)]
        torch.testing.assert_close(moved[site.index], torch.stack(expected).detach(), atol=1e-5, rtol=1e-4)


def test_later_moves_are_made_with_the_best_heads_only():
    cal = calibration("qwen2")
    shares = [1.0, 0.25 + 0.75 * (2 / 3) ** 3, 0.25 + 0.75 * (1 / 3) ** 3]
    scores = torch.zeros(16)
    for share in shares:
        best = scores.sort(descending=True).indices[: round(share * 16)]
        keep = torch.zeros(16).index_fill(0, best, 1.0).requires_grad_()
        one_pass_losses(cal, keep.split(8)).mean().backward()
        scores = scores - keep.grad
    ours = torch.cat(Movement(steps=3, keep_ratio=0.25).scores(cal))
    torch.testing.assert_close(ours, scores, atol=1e-4, rtol=1e-3)


# --- lora_gradient ---------------------------------------------------------------------------------------------------


def test_the_slope_is_what_a_step_takes_from_the_product():
    torch.manual_seed(0)
    a, b, ga, gb = torch.randn(2, 5), torch.randn(4, 2), torch.randn(2, 5), torch.randn(4, 2)
    torch.testing.assert_close(slope(a, b, ga, gb), b @ a - (b - gb) @ (a - ga))


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_first_importance_is_that_of_projected_gradients(family):
    """With B = 0 the gradient of B is G·Aᵀ, so that G·Aᵀ·A stands in for G = ∂loss/∂W."""
    cal = calibration(family)
    torch.manual_seed(7)
    ours = LoraGradient(steps=1, rank=3, decay=0.0).scores(cal)
    loss = cal.losses(cal.batches[0]).mean()
    torch.manual_seed(7)
    for site, scores in zip(cal.sites, ours, strict=True):
        squares = {}
        for name in site.layout.projections:
            weight = getattr(site.attention, name).weight
            w, g = weight, torch.autograd.grad(loss, weight, retain_graph=True)[0]
            if family == "gpt2":
                w, g = w.T, g.T
            a, _ = adapter(w, 3)
            squares[name] = ((g @ a.T @ a) * w).square().detach()
        holder = type(
            site.attention.__class__.__name__, (), {n: type("", (), {"weight": x}) for n, x in squares.items()}
        )
        q, k, v, o = by_hand(holder, family)
        share = len(q) // len(k)
        for head in range(8):
            own = slice(head * HEAD, head * HEAD + HEAD)
            group = slice(head // share * HEAD, head // share * HEAD + HEAD)
            expected = q[own].sum() + o[:, own].sum() + (k[group].sum() + v[group].sum()) / share
            assert scores[head].item() == pytest.approx(expected.item(), rel=1e-3)


def test_importance_is_a_moving_average_while_the_adapters_learn():
    cal = calibration("qwen2")
    torch.manual_seed(7)
    first, _ = LoraGradient(steps=1, decay=0.0).scores(cal)
    torch.manual_seed(7)
    second, _ = LoraGradient(steps=2, decay=0.0).scores(cal)
    torch.manual_seed(7)
    both, _ = LoraGradient(steps=2, decay=0.6).scores(cal)
    assert not first.equal(second)
    torch.testing.assert_close(both, 0.6 * 0.4 * first + 0.4 * second)


def test_an_adapter_adds_its_product_and_goes():
    cal = calibration("phi3")
    site, x = cal.sites[0], torch.randn(2, 48)
    dense = site.output(x)
    a, b = torch.randn(2, 48), torch.randn(48, 2)
    with adapted([site], [{"o_proj": (a, b)}]):
        torch.testing.assert_close(site.output(x), dense + x @ (b @ a).T, atol=1e-4, rtol=1e-4)
    assert site.output(x).equal(dense)


# --- expert ----------------------------------------------------------------------------------------------------------


def test_usage_counts_prompts_and_the_gate_breaks_ties():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5], [1.0, 2.0, 3.0, -0.5]])
    counts = usage((logits > 0).float(), logits)
    assert counts.floor().tolist() == [2, 2, 1, 1]
    assert counts.argsort(descending=True).tolist()[2:] == [2, 3]
    assert (counts - counts.floor()).min() > 0


def test_the_router_is_the_agents_of_the_agents_own_training(tmp_path):
    cal = calibration("qwen2", seed=2)
    config = replace(SHORT, learning_rate=0.3, alpha=(3.0, 3.0), max_steps=8)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        scores = Expert(config=config, hidden_dim=8).scores(cal)
        torch.manual_seed(4)
        router = AgentPolicy(cal.geometries, hidden_dim=8)
    train(cal.model, cal.tokenizer, Sums(), router, replace(config, seed=2), output_dir=tmp_path, quiet=True)
    for index, (ours, x) in enumerate(zip(scores, cal.logits(router), strict=True)):
        kept = Gate()(x, cal.geometries[index]).sum(0)
        assert ours.floor().equal(kept)
    assert torch.cat(scores).floor().unique().numel() > 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Movement(keep_ratio=1.5), "keep_ratio=1.5 was given; it must be above 0 and at most 1"),
        (lambda: Movement(steps=0), "steps=0 was given; it must be above 0"),
        (lambda: Variational(weight=-1), "weight=-1 was given; it must be above 0"),
        (lambda: LoraGradient(decay=1.0), "decay=1.0 was given; it must be 0 or more and below 1"),
    ],
)
def test_wrong_options_get_a_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()
