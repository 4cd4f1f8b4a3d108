"""Loading: folders, modules in memory, and one sentence for whatever cannot be loaded."""

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.models import load_model
from tests.tiny import tiny_model, tiny_tokenizer


def test_a_saved_folder_loads_in_evaluation_mode_padding_on_the_left(tmp_path):
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    tokenizer.padding_side = "right"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded, its = load_model(tmp_path, device="cpu")
    assert not loaded.training
    assert its.padding_side == "left"
    assert {name: x.tolist() for name, x in loaded.state_dict().items()} == {
        name: x.tolist() for name, x in model.state_dict().items()
    }
    assert load_model(tmp_path, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_module_in_memory_is_taken_as_it_is_and_needs_a_tokenizer():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = None
    loaded, its = load_model(model, tokenizer=tokenizer)
    assert loaded is model
    assert its.pad_token == "<eos>"
    with pytest.raises(MicrogliaError, match="a model in memory does not say where its tokenizer is; pass tokenizer="):
        load_model(model)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(MicrogliaError, match=r"holds no config\.json; give a folder written by save_pretrained"):
        load_model(tmp_path, device="cpu")


def test_a_model_that_is_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MicrogliaError, match="no model could be found at 'no/where'"):
        load_model("no/where", device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(MicrogliaError, match=r"no tokenizer could be loaded from .*; pass tokenizer="):
        load_model(tmp_path, device="cpu")


def test_damaged_weights_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(MicrogliaError, match=r"the weights at .* could not be loaded"):
        load_model(tmp_path, device="cpu", tokenizer=tiny_tokenizer())


def test_weights_that_lack_what_the_config_says_are_refused(tmp_path):
    """transformers would draw them at random and only warn, so agents would be trained on noise."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        MicrogliaError, match=r"lack model\.layers\.2\..* and \d+ more, which a LlamaForCausalLM of its"
    ):
        load_model(tmp_path, device="cpu", tokenizer=tiny_tokenizer())


def test_tied_weights_lack_nothing(tmp_path):
    model = tiny_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu", tokenizer=tiny_tokenizer())
    assert loaded.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "no model could be found at"),
        ("config.json", '{"model_type"', "no model could be found at"),
        ("tokenizer.json", "{}", "no tokenizer could be loaded from"),
        ("tokenizer.json", '{"version": 1', "no tokenizer could be loaded from"),
    ],
)
def test_damaged_json_is_refused(tmp_path, name, text, sentence):
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(MicrogliaError, match=sentence):
        load_model(tmp_path, device="cpu")


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"is an encoder-decoder model \(t5\); microglia prunes decoder-only"
    ):
        load_model(tmp_path, device="cpu")
