"""Layers, sizes and sites of every family, and one sentence for every model that has none."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from microglia.anatomy import FAMILIES, Anatomy, HeadGeometry, causal_lm, context_length, input_device
from microglia.errors import ConfigError, UnsupportedModelError
from microglia.units import find_sites
from tests import tiny
from tests.reference import sliding_windows
from tests.tiny import tiny_model


def test_every_known_attention_class_has_a_tiny_model():
    classes = {type(find_sites(tiny_model(family))[0].attention).__name__ for family in tiny.FAMILIES}
    assert classes == set(FAMILIES)


def test_sites_know_their_geometry_layer_and_output(family):
    model = tiny_model(family)
    sites = find_sites(model)
    kv_heads = 8 if family in ("llama", "gpt2") else 4
    head_dim = getattr(model.config, "head_dim", None) or 48 // 8
    assert [site.geometry for site in sites] == [HeadGeometry(8, kv_heads, head_dim)] * 2
    assert [(site.index, site.layer.index) for site in sites] == [(0, 0), (1, 1)]
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
    anatomy = Anatomy(tiny_model("qwen2"))
    anatomy.check_head_count(None)
    anatomy.check_head_count(8)
    with pytest.raises(ConfigError, match="num_heads=32 was given, but the model has 8 heads in its 2 layers"):
        anatomy.check_head_count(32)


def test_wrappers_do_not_hide_the_model():
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    assert causal_lm(Wrapper()) is model
    assert [site.name for site in find_sites(Wrapper())] == [site.name for site in find_sites(model)]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_that_the_model_computes_with(family):
    model = tiny_model(family)
    anatomy = Anatomy(model)
    ids = torch.randint(2, 97, (1, 6))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    assert anatomy.vocab_size == output.logits.shape[-1] == 97
    assert anatomy.hidden_size == output.hidden_states[0].shape[-1] == 48
    assert anatomy.context == context_length(model) == 256
    assert anatomy.attention_backend == model.config._attn_implementation
    assert input_device(model) == torch.device("cpu")


def test_layers_hold_an_attention_an_mlp_and_the_heads(family):
    model = tiny_model(family)
    anatomy, calls = Anatomy(model), []
    assert [layer.index for layer in anatomy.layers] == [0, 1]
    assert [layer.heads for layer in anatomy.layers] == [site.geometry for site in find_sites(model)]
    for layer in anatomy.layers:
        assert model.get_submodule(layer.name) is layer.module
        assert model.get_submodule(layer.attention_name) is layer.attention
        assert model.get_submodule(layer.mlp_name) is layer.mlp
        for name in (*layer.family.mlp.up, layer.family.mlp.down):
            assert layer.mlp.get_submodule(name).weight.dim() == 2
        for name in layer.family.norms:
            assert layer.module.get_submodule(name).weight.dim() == 1
    for part in (anatomy.stack, anatomy.layers[0].module, anatomy.layers[1].module):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        model(torch.randint(2, 97, (1, 6)))
    assert calls == [anatomy.layers[0].module, anatomy.layers[1].module, anatomy.stack]


def test_the_family_names_the_classes_that_transformers_makes(family):
    model = tiny_model(family)
    anatomy = Anatomy(model)
    assert (type(model).__name__, type(anatomy.stack).__name__) == (anatomy.family.causal, anatomy.family.decoder)


def test_windows_are_those_of_the_models_own_config(family):
    model = tiny_model(family)
    assert list(Anatomy(model).windows) == sliding_windows(model.config)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, (None, 5)),
        ("mistral", {"sliding_window": None}, (None, None)),
    ],
)
def test_a_window_counts_where_the_model_uses_it(family, changes, windows):
    """The truth by hand: the keys that have any weight for the last query."""
    model = tiny_model(family, backend="eager", **changes)
    anatomy = Anatomy(model)
    with torch.no_grad():
        weights = model(torch.randint(2, 97, (1, 9)), output_attentions=True).attentions
    assert anatomy.windows == windows
    assert [int((w[0, 0, -1] > 0).sum()) for w in weights] == [window or 9 for window in windows]
    kinds = tuple("full_attention" if window is None else "sliding_attention" for window in windows)
    assert anatomy.layer_kinds in ((), kinds)


def test_sizes_of_a_model_that_also_takes_images_are_those_of_its_language_model():
    text = {**tiny.BASE, "model_type": "llama", "head_dim": 6}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    anatomy = Anatomy(model)
    assert len(anatomy.layers) == 2
    assert (anatomy.hidden_size, anatomy.vocab_size, anatomy.context) == (48, 97, 256)
    assert anatomy.windows == (None, None)
    assert type(anatomy.stack).__name__ == anatomy.family.decoder == "LlamaModel"
