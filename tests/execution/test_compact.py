"""Masked ≡ compact, for every family, back end and kind of decision; and the dense model comes back."""

import pytest
import torch

from microglia.attach import attached
from microglia.errors import MicrogliaError
from microglia.execution import Compact, Decision
from microglia.gate import Gate
from microglia.units import find_sites
from microglia.units.kv import kv_bytes
from tests.tiny import BACKENDS, FAMILIES, Fixed, pruner_of, step_logits, tiny_model, tiny_prompts, uneven

IDS, MASK = tiny_prompts(14, 9, 3)
ANSWER = tiny_prompts(7, 7, 7, seed=2)[0]


def pruned(model, pruner, execution):
    with attached(model, pruner, execution):
        return step_logits(model, IDS, MASK, ANSWER)


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_masked_is_compact_in_prefill_and_every_step(family, backend, rows, fill):
    model = tiny_model(family, backend=backend)
    pruner = uneven(model, rows, fill=fill)
    dense = step_logits(model, IDS, MASK, ANSWER)
    masked, compact = (pruned(model, pruner, execution) for execution in ("masked", "compact"))
    torch.testing.assert_close(compact, masked, atol=1e-5, rtol=0)
    assert compact[:, 0].equal(dense[:, 0])
    assert (compact[:, 1:] - dense[:, 1:]).abs().amax((1, 2)).min() > 1e-2  # something is gone in every row


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_in_bfloat16_the_error_is_at_most_twice_the_frameworks_own(family, rows):
    exact, rough = tiny_model(family), tiny_model(family, dtype=torch.bfloat16)
    pruner = uneven(exact, rows)

    def error(ours, truth):
        return (ours.float() - truth).pow(2).mean().sqrt()

    framework = error(step_logits(rough, IDS, MASK, ANSWER), step_logits(exact, IDS, MASK, ANSWER))
    ours = error(pruned(rough, pruner, "compact"), pruned(exact, pruner, "masked"))
    assert 0 < ours <= 2 * framework


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_the_heads_are_gone(family, rows):
    model = tiny_model(family)
    pruner, shapes = uneven(model, rows), {}
    with torch.no_grad():
        whole = kv_bytes(model(IDS, attention_mask=MASK, use_cache=True).past_key_values)
        with attached(model, pruner, "compact") as trace:
            cache = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = [
        site.geometry.by_group(keep).any(-1).sum(-1).max()
        for site, keep in zip(find_sites(model), trace.keep, strict=True)
    ]
    assert [layer.keys.shape[1] for layer in cache.layers] == groups
    assert kv_bytes(cache) < whole
    sliced = [name for name, p in model.named_parameters() if shapes[name] != tuple(p.shape)]
    assert (len(sliced) > 0) == (rows == 1)  # rows of their own leave the projections dense


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_the_attention_implementation_may_change_while_compact(family, rows):
    """A copied config would go stale: masks for sdpa would meet an eager layer."""
    logits = []
    for first, second in [("sdpa", "sdpa"), ("sdpa", "eager"), ("eager", "sdpa")]:
        model = tiny_model(family, backend=first)
        with torch.no_grad(), attached(model, uneven(model, rows), "compact"):
            cache = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
            model.set_attn_implementation(second)
            mask = torch.cat([MASK, MASK[:, -1:].expand(-1, 2)], dim=1)
            logits.append(model(ANSWER[:, :2], attention_mask=mask, past_key_values=cache).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_first_layer_with_a_single_head_is_enough(family):
    model = tiny_model(family)
    lonely = [torch.full((1, 8), -1.0), torch.full((1, 8), 1.0)]
    lonely[0][0, 5] = 1
    pruner = pruner_of(Fixed(lonely))
    torch.testing.assert_close(pruned(model, pruner, "compact"), pruned(model, pruner, "masked"), atol=1e-5, rtol=0)
    with attached(model, pruner, "compact") as trace:
        cache = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
    assert trace.keep[0].sum(-1).tolist() == [1, 1, 1]
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "own"])
def test_padding_is_not_attended_after_compaction(family, backend, rows):
    """What stands at padded places changes nothing."""
    model = tiny_model(family, backend=backend)
    pruner, mask = uneven(model, rows), MASK[:2]
    other = torch.where(mask.bool(), IDS[:2], 50)
    with attached(model, pruner, "compact"):
        one = step_logits(model, IDS[:2], mask, ANSWER[:2])
        two = step_logits(model, other, mask, ANSWER[:2])
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_a_batch_never_changes_the_answer_of_a_row(family):
    """A row that keeps fewer heads than its neighbours is filled up with heads that stay gated off."""
    model = tiny_model(family)
    pruner = uneven(model, 3)
    pruner.policy.logits[0][0, 2:] = 1  # a neighbour that keeps much
    together = pruned(model, pruner, "compact")
    for row in range(3):
        own, alone = MASK[row].bool(), pruner_of(Fixed([x[row : row + 1] for x in pruner.policy.logits]))
        with attached(model, alone, "compact"):
            single = step_logits(model, IDS[row : row + 1, own], MASK[row : row + 1, own], ANSWER[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, atol=2e-5, rtol=0)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_soft_keeps_are_refused():
    model = tiny_model("llama")
    with pytest.raises(
        MicrogliaError, match=r"got soft keeps; compaction needs keeps of 0 or 1, use Gate\(mode='hard'\)"
    ):
        pruned(model, uneven(model, gate=Gate(mode="soft")), "compact")


def test_uneven_groups_are_refused():
    sites = find_sites(tiny_model("qwen2"))
    keep = [torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]]), torch.ones(1, 8)]
    with pytest.raises(MicrogliaError, match=r"keeps \[2, 1, 0, 0\] heads in its groups; every kept group must keep"):
        Compact().apply(sites, Decision(keep)).__enter__()


def test_rows_of_their_own_need_a_cache():
    model = tiny_model("llama")
    with (
        attached(model, uneven(model, 3), "compact"),
        pytest.raises(MicrogliaError, match="the pass that read the prompt kept no key/value cache"),
    ):
        model(IDS, use_cache=False)
