"""llama.cpp itself reads the GGUF exports: its log-probabilities are those of the frozen model.

xllamacpp is a build of llama.cpp in a wheel: pip install xllamacpp
"""

import pytest
import torch

from microglia.export import export
from microglia.export.frozen import frozen
from tests.export.plans import byte_fallback_tokenizer, byte_level_tokenizer, phi3_tokenizer, uneven_plan
from tests.tiny import tiny_model

pytest.importorskip("gguf", reason="gguf is not installed; pip install microglia[export]")
xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; pip install xllamacpp")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "llama": ("llama", {}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
}


def served(path):
    """A model in llama.cpp, computed and cached in float32."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_gpu_layers, options.n_parallel = str(path), 64, 0, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup, options.verbosity = False, 0
    return xllamacpp.Server(options)


def answer(server, prompt, count, vocabulary):
    """Tokens that follow, and the log-probabilities (V,) of every token at the first place."""
    request = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": vocabulary}
    places = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    first = torch.full((vocabulary,), torch.nan)
    for entry in places[0]["top_logprobs"]:
        first[entry["id"]] = entry["logprob"]
    return [place["id"] for place in places], first


@pytest.mark.parametrize("tokenizer", [byte_fallback_tokenizer(), byte_level_tokenizer()], ids=["bytes", "byte level"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_says_what_the_frozen_model_says(kind, tokenizer, tmp_path):
    family, changes = KINDS[kind]
    size = len(tokenizer) + 3  # the embedding may have more rows than there are tokens
    model = tiny_model(family, **{**changes, "vocab_size": size, "eos_token_id": tokenizer.eos_token_id})
    plan = uneven_plan(model)
    path = export(model, tokenizer, plan, tmp_path / "exported", format="gguf").folder / "model.gguf"
    text = "ab a\nbab 12 "
    ids = tokenizer(text, return_tensors="pt").input_ids
    with frozen(model, plan) as small, torch.no_grad():
        expected = small(ids).logits[0, -1].log_softmax(-1)
        wanted = small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    server = served(path)
    for prompt in (ids[0].tolist(), text):
        tokens, found = answer(server, prompt, 4, size)
        assert (found - expected).abs().max() < 1e-5
        assert tokens == wanted[0, ids.shape[1] :].tolist()


def test_a_models_name_brings_no_rules_of_another_tokenizer(tmp_path):
    tokenizer = byte_level_tokenizer()  # without the token that llama.cpp looks for in every phi-3
    model = tiny_model("phi3", vocab_size=len(tokenizer), eos_token_id=0)
    model.config._name_or_path = "microsoft/Phi-3-mini-4k-instruct"
    exported = export(model, tokenizer, uneven_plan(model), tmp_path / "exported", format="gguf")
    tokens, _ = answer(served(exported.folder / "model.gguf"), "ab", 2, len(tokenizer))
    assert len(tokens) == 2


def test_white_space_behind_the_special_tokens_of_phi3_is_dropped_as_the_tokenizer_drops_it(tmp_path):
    tokenizer = phi3_tokenizer()
    model = tiny_model("phi3", vocab_size=len(tokenizer), eos_token_id=2)
    exported = export(model, tokenizer, uneven_plan(model), tmp_path / "exported", format="gguf")
    assert not any("white space" in sentence for sentence in exported.lost)
    text = "<|user|>\nab a<|end|>\n"
    server, size = served(exported.folder / "model.gguf"), len(tokenizer)
    (_, ours), (_, theirs) = (answer(server, p, 2, size) for p in (tokenizer(text).input_ids, text))
    assert (ours - theirs).abs().max() < 1e-5
