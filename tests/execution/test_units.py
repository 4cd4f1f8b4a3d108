"""The identities of heads, for channels and sublayers and all of them together, on every family."""

import pytest
import torch

from microglia.attach import attached
from microglia.errors import MicrogliaError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.units import find_sites
from tests.tiny import step_logits, tiny_prompts, tiny_tokenizer
from tests.units.many import KINDS, deep_model, some

IDS, MASK = tiny_prompts(14, 9, 3)
ANSWER = tiny_prompts(7, 7, 7, seed=2)[0]
ROWS = pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
UNITS = pytest.mark.parametrize("units", [("channel",), KINDS], ids="+".join)


def pruned(model, pruner, execution):
    with attached(model, pruner, execution) as trace:
        return step_logits(model, IDS, MASK, ANSWER), trace


@ROWS
@UNITS
def test_masked_is_compact_and_leaving_restores(family, units, rows, snapshot):
    model = deep_model(family)
    pruner, before = some(model, rows, units), snapshot(model)
    dense = step_logits(model, IDS, MASK, ANSWER)
    (masked, trace), (compact, _) = (pruned(model, pruner, execution) for execution in ("masked", "compact"))
    torch.testing.assert_close(compact, masked, atol=2e-5, rtol=0)
    assert compact[:, 0].equal(dense[:, 0])
    assert (compact[:, 1:] - dense[:, 1:]).abs().amax((1, 2))[::2].min() > 1e-3
    assert (trace.keep_ratio < 1).any()
    assert snapshot(model) == before


def test_all_kept_is_the_untouched_model_bit_for_bit(family):
    model = deep_model(family)
    dense = step_logits(model, IDS, MASK, ANSWER)
    geometries = [site.geometry for site in find_sites(model, KINDS)]
    for execution in ("masked", "compact"):
        pruner = Pruner(StaticPolicy.all_kept(geometries), units=KINDS)
        assert pruned(model, pruner, execution)[0].equal(dense)


@ROWS
def test_channels_leave_their_mean_behind_in_every_execution(family, rows):
    model = deep_model(family)
    pruner = some(model, rows, fill="mean")
    (masked, _), (compact, _) = (pruned(model, pruner, execution) for execution in ("masked", "compact"))
    torch.testing.assert_close(compact, masked, atol=2e-5, rtol=0)
    assert (masked - pruned(model, some(model, rows), "masked")[0]).abs().max() > 1e-3


@ROWS
def test_gates_are_what_zeros_written_by_hand_are(family, rows):
    """The truth by hand: zeros in down's input at the channels of pruned blocks, and zero contributions."""
    model = deep_model(family)
    pruner = some(model, rows, ("channel", "sublayer"))
    ours, trace = pruned(model, pruner, "masked")
    sites = pruner.sites(model)
    handles = []
    for site, keep in zip(sites, trace.keep, strict=True):
        keep = keep.expand(3, -1)
        if site.unit == "channel":
            order = pruner.arrangement.orders[site.layer.index].view(-1, site.geometry.block)

            def zero(_, inputs, order=order, keep=keep):
                x = inputs[0].clone()
                for row, one in enumerate(keep if x.shape[1] == 1 else []):
                    for block in (one == 0).nonzero().flatten():
                        x[row, :, order[block]] = 0
                return (x,)

            handles.append(site.layer.down.register_forward_pre_hook(zero))
            continue
        names = site.layer.family.norms_after or (site.layer.family.attention_name, site.layer.family.mlp_name)
        for half, name in enumerate(names):

            def drop(_, inputs, output, half=half, keep=keep):
                x = output[0] if isinstance(output, tuple) else output
                if x.shape[1] > 1:
                    return None
                x = x * keep[:, half, None, None]
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handles.append(getattr(site.layer.module, name).register_forward_hook(drop))
    truth = step_logits(model, IDS, MASK, ANSWER)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


def test_a_neighbour_never_changes_the_answer_of_a_row(family):
    model = deep_model(family)
    pruner = some(model, 3)
    together = pruned(model, pruner, "compact")[0]
    for row in range(3):
        own = MASK[row].bool()
        alone = some(model, 3)
        alone.policy.logits = [x[row : row + 1] for x in alone.policy.logits]
        with attached(model, alone, "compact"):
            single = step_logits(model, IDS[row : row + 1, own], MASK[row : row + 1, own], ANSWER[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, atol=3e-5, rtol=0)


def test_answers_are_the_same_tokens(family):
    model, prompts = deep_model(family), ["what is 3+4?", "7*8-2=", "a"]
    for rows in (1, 3):
        pruner = some(model, rows)
        options = {"max_new_tokens": 10, "min_new_tokens": 10}
        masked, compact = (
            generate(model, tiny_tokenizer(), prompts, pruner, execution=execution, **options).tokens
            for execution in ("masked", "compact")
        )
        assert masked.equal(compact)


def test_what_is_gone_is_gone(family):
    """Rows and columns of the MLP, the calls of a sublayer's modules, and its keys and values."""
    model = deep_model(family)
    pruner, calls = some(model), []
    sites, layer = pruner.sites(model), find_sites(model)[2].layer
    with torch.no_grad(), attached(model, pruner, "compact") as trace:
        cache = model(IDS, attention_mask=MASK, use_cache=True).past_key_values
        modules = [*layer.attention.modules(), *layer.norms_around(0)]
        handles = [m.register_forward_hook(lambda m, *_: calls.append(type(m))) for m in modules[1:]]
        mask = torch.cat([MASK, MASK[:, -1:]], 1)
        model(IDS[:, -1:], attention_mask=mask, past_key_values=cache)
        for handle in handles:
            handle.remove()
        for site, keep in zip(sites, trace.keep, strict=True):
            if site.unit == "channel" and bool(keep.any()):
                down = site.layer.down
                inputs = down.weight.shape[0] if family == "gpt2" else down.weight.shape[1]
                assert inputs == int(keep[0].sum()) * site.geometry.block
        assert cache.get_seq_length() == 15
        assert cache.layers[2].get_seq_length() == 15
        assert cache.layers[2].keys.numel() == 0
    assert {kind.__name__ for kind in calls} <= {type(m).__name__ for m in layer.norms_around(0)}


def test_soft_keeps_of_channels_are_refused_where_they_would_be_cut():
    model = deep_model("llama")
    pruner = some(model, units=("channel",))
    soft = Pruner(pruner.policy, Gate(mode="soft"), units=("channel",), arrangement=pruner.arrangement)
    with pytest.raises(MicrogliaError, match="mlp got soft keeps; compaction needs keeps of 0 or 1"):
        pruned(model, soft, "compact")
