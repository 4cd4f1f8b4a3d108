"""Sublayers: which are protected, what goes with them, and a cache that counts on without keys."""

import pytest
import torch

from microglia.attach import attached
from microglia.gate import Gate, keep_ratio
from microglia.units import Arrangement, ChannelGeometry, SublayerGeometry, find_sites, nested
from tests.tiny import step_logits, tiny_prompts
from tests.units.many import KINDS, deep_model, some


def test_the_first_two_layers_and_the_last_are_protected():
    model = deep_model("llama")
    assert [site.geometry.protected for site in find_sites(model, ("sublayer",))] == [2, 2, 0, 0, 2]
    free = find_sites(model, ("sublayer",), Arrangement(protected=(3,)))
    assert [site.geometry.protected for site in free] == [0, 0, 0, 2, 0]
    scores = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
    assert SublayerGeometry().rectangle(scores, 5).tolist() == [[False, False], [True, False]]
    assert SublayerGeometry(2).rectangle(scores).all()


def test_heads_and_channels_go_with_their_sublayer_and_gradients_go_through():
    blocks, sublayers = ChannelGeometry(64, 8), SublayerGeometry()
    heads = find_sites(deep_model("llama"))[0].geometry
    logits = [torch.ones(2, 8) * 3, torch.ones(2, 8) * 3, torch.tensor([[-2.0, 2.0], [2.0, -2.0]])]
    logits = [x.requires_grad_() for x in logits]
    keep = Gate("straight-through", bucket=1).every(logits, [heads, blocks, sublayers])
    assert [k.sum(-1).tolist() for k in keep] == [[0, 8], [8, 0], [1, 1]]
    assert keep_ratio(keep).tolist() == [0.5, 0.5]
    gradients = torch.autograd.grad(sum(k.sum() for k in keep), logits)
    assert all(g.abs().sum() > 0 for g in gradients)
    alone = [torch.ones(1, 8), torch.zeros(1, 2)]
    assert nested(alone, [heads, heads])[0].equal(alone[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_a_cache_without_keys_goes_on_counting(family):
    model = deep_model(family)
    ids, mask = tiny_prompts(9, 4)
    with torch.no_grad(), attached(model, some(model), "compact"):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for length in range(10, 21):  # beyond the sliding window
            mask = torch.cat([mask, mask[:, -1:]], 1)
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
            assert {layer.get_seq_length() for layer in cache.layers} == {length}
        assert cache.layers[2].keys.shape[1] == 0
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(Exception, match="this cache lost heads to an answer that is over"):
        model(ids[:, -1:], past_key_values=cache)


def test_a_decision_does_not_depend_on_the_order_in_which_kinds_are_named(family):
    model = deep_model(family)
    ids, mask = tiny_prompts(14, 9, 3)
    answer = tiny_prompts(4, 4, 4, seed=2)[0]
    pruner = some(model, 3, fill="mean")
    logits = dict(zip(KINDS, zip(*[iter(pruner.policy.logits)] * 5, strict=True), strict=True))
    for execution in ("masked", "compact"):
        steps = []
        for kinds in (KINDS, KINDS[::-1]):
            other = some(model, 3, kinds, fill="mean")
            other.policy.logits = [x for kind in kinds for x in logits[kind]]
            with attached(model, other, execution):
                steps.append(step_logits(model, ids, mask, answer))
        torch.testing.assert_close(*steps, atol=1e-5, rtol=0)
