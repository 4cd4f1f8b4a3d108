"""Sites of every family, and one sentence for every model that has none."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, T5Config, T5ForConditionalGeneration

from microglia.errors import ConfigError, UnsupportedModelError
from microglia.geometry import HeadGeometry
from microglia.sites import FAMILIES, causal_lm, check_head_count, find_sites
from tests import tiny
from tests.tiny import tiny_model


def test_every_known_attention_class_has_a_tiny_model():
    seen = {type(find_sites(tiny_model(family))[0].attention).__name__ for family in tiny.FAMILIES}
    assert seen == set(FAMILIES)


def test_sites_know_their_geometry_layer_and_output(family):
    model = tiny_model(family)
    sites = find_sites(model)
    kv_heads = 8 if family in ("llama", "gpt2") else 4
    head_dim = getattr(model.config, "head_dim", None) or 48 // 8
    assert [site.geometry for site in sites] == [HeadGeometry(8, kv_heads, head_dim)] * 2
    assert [(site.index, site.layer) for site in sites] == [(0, 0), (1, 1)]
    for site in sites:
        assert model.get_submodule(site.name) is site.attention
        assert site.output is getattr(site.attention, "c_proj" if family == "gpt2" else "o_proj")


def test_the_output_projection_reads_heads_in_the_order_of_the_attention_weights(family):
    """The slice h of the output projection's input is weights_h · v_g(h), recomputed from the cache."""
    model = tiny_model(family, backend="eager")
    site, inputs = find_sites(model)[1], []
    handle = site.output.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        output = model(torch.randint(2, 97, (2, 6)), output_attentions=True, use_cache=True)
    handle.remove()
    groups = site.geometry.group_of(torch.arange(8))
    values = output.past_key_values.layers[1].values[:, groups]
    heads = (output.attentions[1] @ values).transpose(1, 2)
    torch.testing.assert_close(site.geometry.split(inputs[0]), heads)


def test_a_model_of_an_unknown_family_is_refused_by_its_class():
    config = GPTNeoXConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(
        UnsupportedModelError, match=r"GPTNeoXForCausalLM has attention layers of class GPTNeoXAttention"
    ):
        find_sites(AutoModelForCausalLM.from_config(config))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration has attention layers of class T5Att"):
        find_sites(T5ForConditionalGeneration(config))


def test_a_model_without_attention_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Linear has no attention layer that microglia knows.*families\.py"
    ):
        find_sites(nn.Linear(2, 2))


def test_attention_that_computes_itself_is_refused():
    with pytest.raises(UnsupportedModelError, match="set reorder_and_upcast_attn=False"):
        find_sites(tiny_model("gpt2", reorder_and_upcast_attn=True))


def test_the_head_count_is_checked_when_given():
    sites = find_sites(tiny_model("qwen2"))
    check_head_count(sites, None)
    check_head_count(sites, 8)
    with pytest.raises(ConfigError, match="num_heads=32 was given, but the model has 8 heads in its 2 sites"):
        check_head_count(sites, 32)


def test_wrappers_are_seen_through():
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    assert causal_lm(Wrapper()) is model
    assert [site.name for site in find_sites(Wrapper())] == [site.name for site in find_sites(model)]
