"""Scores that need one pass over weights, outputs or gradients, against values worked in another way."""

import pytest
import torch

from microglia.attach import attached
from microglia.criteria.entropy import Entropy
from microglia.criteria.norm import Norm
from microglia.criteria.random import Random
from microglia.criteria.taylor import Taylor
from microglia.criteria.weight import Weight
from microglia.criteria.weights import head_weights
from microglia.errors import ConfigError
from microglia.policies import SignalPolicy
from microglia.signals import attention_entropy
from microglia.training.lora import with_lora
from tests.criteria.calibrated import EXAMPLES, LAYOUTS, calibration, one_pass_losses, raw_outputs
from tests.reference import head_norms

HEAD = 6  # size of a head in the tiny models


def oriented(projection):
    """(out, in), whatever the family stores."""
    return projection.weight.T if hasattr(projection, "nf") else projection.weight


def by_hand(attention, family):
    """q, k, v (out, in) and o (out, in) read from the family's own attributes."""
    if family in ("llama", "qwen2"):
        return [oriented(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    fused, o = ("qkv_proj", "o_proj") if family == "phi3" else ("c_attn", "c_proj")
    keys = 24 if family == "phi3" else 48
    return [*oriented(getattr(attention, fused)).split([48, keys, keys]), oriented(getattr(attention, o))]


@pytest.mark.parametrize("family", LAYOUTS)
def test_weight_is_the_norm_of_the_heads_slices(family):
    cal = calibration(family)
    for site, scores in zip(cal.sites, Weight().scores(cal), strict=True):
        q, k, v, o = by_hand(site.attention, family)
        share = len(q) // len(k)
        norms = []
        for head in range(8):
            own = slice(head * HEAD, head * HEAD + HEAD)
            group = slice(head // share * HEAD, head // share * HEAD + HEAD)
            squares = q[own].square().sum() + o[:, own].square().sum()
            squares = squares + (k[group].square().sum() + v[group].square().sum()) / share
            norms.append(squares.sqrt())
        expected = torch.stack(norms) / torch.stack(norms).mean()
        torch.testing.assert_close(scores, expected.detach(), atol=1e-5, rtol=0)
        assert scores.std() > 1e-3


def test_weights_hold_what_lora_added():
    cal = calibration("qwen2")
    plain = head_weights(cal.sites[0])
    model = with_lora(cal.model, rank=2)
    adapter = model.get_base_model().model.layers[0].self_attn.o_proj
    torch.nn.init.normal_(adapter.lora_B["default"].weight)
    added = adapter.get_delta_weight("default").T.unflatten(0, (8, HEAD))
    torch.testing.assert_close(head_weights(cal.sites[0]).o, plain.o + added.detach(), atol=1e-5, rtol=0)


def test_random_is_seeded():
    a, b, c = (Random().policy(calibration(seed=seed)).logits for seed in (3, 3, 4))
    assert all(x.equal(y) for x, y in zip(a, b, strict=True))
    assert not a[0].equal(c[0])
    assert not a[0].equal(a[1])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_norm_is_the_share_of_what_the_head_writes_at_the_prompt(family):
    cal = calibration(family, batch_size=3)
    expected = []
    for example in EXAMPLES:
        ids = torch.tensor([cal.tokenizer(example.question)["input_ids"]])
        outputs = []
        handles = [
            s.output.register_forward_pre_hook(lambda _, x, to=outputs: to.append(x[0].unflatten(-1, (8, HEAD))))
            for s in cal.sites
        ]
        with torch.no_grad():
            cal.lm(input_ids=ids)
        for handle in handles:
            handle.remove()
        norms = [head_norms(x, torch.ones_like(ids))[0] for x in outputs]
        expected.append([x / x.mean() for x in norms])
    for index, scores in enumerate(Norm().scores(cal)):
        truth = torch.stack([row[index] for row in expected])
        torch.testing.assert_close(scores.double(), truth.mean(0), atol=1e-5, rtol=0)
        own = cal.logits(Norm().policy(cal, per_input=True))[index]
        torch.testing.assert_close(own.double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_projected_norm_is_that_of_what_reaches_the_residual_stream(family):
    cal = calibration(family, batch_size=3)
    for site, outputs, scores in zip(cal.sites, raw_outputs(cal), Norm(projected=True).scores(cal), strict=True):
        o = by_hand(site.attention, family)[-1].double().detach()
        norms = []
        for head in range(8):
            alone = torch.zeros_like(outputs)
            alone[:, head] = outputs[:, head]
            norms.append((alone.flatten(1) @ o.T).norm(dim=-1).mean())
        truth = torch.stack(norms) / torch.stack(norms).mean()
        torch.testing.assert_close(scores.double(), truth, atol=1e-5, rtol=0)


def test_a_projected_norm_is_no_signal_of_a_prompt():
    with pytest.raises(ConfigError, match="projected norm of a prompt is not among its signals"):
        Norm(projected=True).policy(calibration(), per_input=True)
    with pytest.raises(ConfigError, match="'both' is not one signal"):
        SignalPolicy("both")


def test_entropy_prefers_heads_that_attend_to_few_tokens():
    cal = calibration("qwen2", batch_size=2)
    own = cal.logits(Entropy().policy(cal, per_input=True))
    static = Entropy().scores(cal)
    assert all(a.equal(x.mean(0)) for a, x in zip(static, own, strict=True))
    # Attention to every key alike scores 0; a head that attends to one key scores 1.
    flat, tokens = torch.zeros(1, 8, 9, 4), torch.ones(1, 9)
    sharp = torch.eye(9)[None, None].expand(1, 8, 9, 9) * 100
    for query, score in ((flat, 1 / 9), (sharp, 1.0)):  # one of nine queries sees itself only, whose entropy is 0
        entropy = attention_entropy(query, query, tokens, scale=1.0)
        assert SignalPolicy("entropy").site_logits(0, entropy)[0, 0].item() == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_a_prompt_decides_for_itself(signal):
    cal = calibration("qwen2")
    policy = SignalPolicy(signal)
    together = cal.logits(policy)
    batch = cal.tokenizer([EXAMPLES[1].question], return_tensors="pt")
    with torch.no_grad(), attached(cal.lm, cal.pruner(policy)) as trace:
        cal.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for alone, rows in zip(trace.logits, together, strict=True):
        torch.testing.assert_close(alone[0], rows[1], atol=1e-5, rtol=0)
        assert rows.std(0).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_taylor_is_the_slope_of_the_loss_in_the_gates(family):
    cal = calibration(family, dtype=torch.float64, batch_size=3)
    whole = calibration(family, dtype=torch.float64)
    scores = Taylor().scores(cal)
    # Norms compute in float32, so a smaller step would measure their rounding.
    step, slopes = 3e-3, torch.zeros(4, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        for site in range(2):
            for head in range(8):
                for sign in (1, -1):
                    keep = [torch.ones(8, dtype=torch.float64) for _ in range(2)]
                    keep[site][head] += sign * step
                    slopes[:, site, head] += sign * one_pass_losses(whole, keep) / (2 * step)
    mean = slopes.abs().mean(0)
    for site, ours in enumerate(scores):
        torch.testing.assert_close(ours.double(), mean[site] / mean[site].norm(), atol=1e-4, rtol=1e-3)
        assert ours.norm().item() == pytest.approx(1)
