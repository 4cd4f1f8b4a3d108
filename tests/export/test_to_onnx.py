"""ONNX Runtime and torch agree on the frozen model: logits to 1e-5, greedy tokens exactly."""

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.export import KeepPlan, export, to_onnx
from microglia.export.frozen import frozen
from microglia.export.precise import float32_allowance, float64_logits
from microglia.export.to_onnx import empty_past, run_step
from microglia.models import load_model
from microglia.units import find_sites
from tests.export.plans import uneven_plan
from tests.tiny import BASE, FAMILIES, positions, tiny_model, tiny_prompts, tiny_tokenizer

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install microglia[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install microglia[export]")


def greedy(session, ids, past, count):
    tokens = []
    for _ in range(count):
        logits, past = run_step(session, ids, past)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


# Mistral has a window in every layer, Gemma in some.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", *OTHERS])
def test_onnx_runtime_agrees_with_torch(family, tmp_path):
    model = tiny_model(family)
    plan, backend = uneven_plan(model), model.config._attn_implementation
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported", format="onnx")
    assert exported.difference <= 1e-5
    assert model.config._attn_implementation == backend  # as it was
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    ids = torch.arange(3, 14)[None]  # longer than the tiny models' window of 7
    with frozen(model, plan) as small:
        past = empty_past(small)
        assert [x.shape[1] for x in past[::2]] == [site.geometry.kv_heads for site in find_sites(small)]
        logits, _ = run_step(session, ids, past)
        with torch.no_grad():
            expected = small(input_ids=ids).logits
        assert (logits - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))
        wanted = small.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy(session, ids, past, 8) == wanted[0, ids.shape[1] :].tolist()
    assert (exported.folder / "model.onnx.data").stat().st_size < exported.dense_bytes


@pytest.mark.slow
def test_the_embedded_reasoner_answers_alike(tmp_path):
    model, tokenizer = load_model("reasoner")
    first = torch.tensor([1.0] * 6 + [0.0] * 2)
    plan = KeepPlan("mean", (first,) * len(find_sites(model)), prompts=1, threshold=0.0, adaptive_keep_ratio=0.75)
    exported = export(model, tokenizer, plan, tmp_path / "exported", format="onnx")
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    ids = tokenizer("Question: What is 12 plus 30?\nAnswer:", return_tensors="pt").input_ids
    with frozen(model, plan) as small:
        wanted = small.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert greedy(session, ids, empty_past(small), 24) == wanted[0, ids.shape[1] :].tolist()


def test_what_the_graph_cannot_hold_is_refused(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"is in torch\.bfloat16, but the graph is written in float32"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "a", format="onnx")


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "rope_theta": 1e4, "factor": 4.0}
MOVING = {"longrope": {**LONG, "original_max_position_embeddings": 16}, "dynamic": {"rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(("kind", "family"), [("dynamic", "llama"), ("longrope", "llama"), ("longrope", "phi3")])
def test_rotary_embeddings_that_change_with_the_length_are_refused(kind, family, tmp_path):
    model = tiny_model(family, rope_parameters={"rope_type": kind, **MOVING[kind]})
    with pytest.raises(UnsupportedModelError, match=f"rotary embedding is of type {kind}, whose frequencies change"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="onnx")
    assert not (tmp_path / "exported").exists()


def deep_model():
    """Twenty layers of sharp attention, which enlarge what float32 rounds off."""
    model = tiny_model("llama", num_hidden_layers=20, tie_word_embeddings=True)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(10)
    return model


@pytest.mark.slow
def test_a_right_graph_of_many_layers_is_kept(tmp_path):
    model = deep_model()
    keep = [torch.zeros(8).index_fill(0, torch.tensor([[2, 3], [0, 1, 4, 5]][i % 2]), 1.0) for i in range(20)]
    plan = KeepPlan("mean", tuple(keep), prompts=1, threshold=0.0, adaptive_keep_ratio=0.4)
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported", format="onnx")
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    ids = torch.arange(3, 22)[None]
    with frozen(model, plan) as small, torch.no_grad():
        exact = float64_logits(small, ids)
        allowed = float32_allowance(small, ids, exact)
        ours = small(input_ids=ids, use_cache=False).logits
        logits, _ = run_step(session, ids, empty_past(small))
    assert 1e-5 * exact.abs().max() < (logits - ours).abs().max()  # more than two float32 runtimes seem to owe
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * allowed
    assert clear.any()
    assert torch.equal(logits.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_judge_computes_in_float64_throughout(family):
    model = tiny_model(family, backend="eager")
    ids = torch.arange(3, 14)[None]
    exact = float64_logits(model, ids)
    assert exact.dtype == torch.float64
    assert model.dtype == torch.float32
    nearly = {name: x * (1 + 1e-12) for name, x in model.double().state_dict().items() if x.is_floating_point()}
    model.load_state_dict(nearly, strict=False)
    moved = (float64_logits(model, ids) - exact).abs().max()
    assert 0 < moved < 1e-9  # a cast to float32 somewhere would round so small a change away, or up to 1e-7


def test_a_graph_that_is_slightly_wrong_is_refused(tmp_path, monkeypatch):
    original = to_onnx.run_step

    def wrong(session, ids, past):
        logits, past = original(session, ids, past)
        return logits * (1 + 1e-4), past

    model = tiny_model("llama")
    monkeypatch.setattr(to_onnx, "run_step", wrong)
    with pytest.raises(MicrogliaError, match=r"differ from a float64 pass by .* so the graph was not kept"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="onnx")
    assert not (tmp_path / "exported").exists()


def test_the_text_half_of_a_model_that_also_sees_is_exported(tmp_path):
    text = {**BASE, **FAMILIES["gemma3_text"], "model_type": "gemma3_text"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Gemma3ForConditionalGeneration(config).eval()
    plan, ids = uneven_plan(model), torch.arange(3, 14)[None]
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported", format="onnx")
    assert any("reads text only" in sentence for sentence in exported.lost)
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    with frozen(model, plan) as small:
        wanted = small.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert greedy(session, ids, empty_past(small), 4) == wanted[0, ids.shape[1] :].tolist()
    for format in ("hf", "gguf"):
        with pytest.raises(UnsupportedModelError, match="Gemma3ForConditionalGeneration cannot be exported"):
            export(model, tiny_tokenizer(), plan, tmp_path / format, format=format)


@pytest.mark.slow
def test_padded_rows_and_their_next_tokens_agree_with_torch(tmp_path):
    """Gemma has layers with a window and layers without; the padding must be hidden in both."""
    ids, mask = tiny_prompts(12, 4)
    model = tiny_model("gemma2")
    plan, places = uneven_plan(model), positions(mask)
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported", format="onnx")
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    with frozen(model, plan) as small, torch.no_grad():
        past, cache = empty_past(small, rows=len(ids)), None
        for _ in range(3):
            inputs = zip(names, [ids, mask.long(), places, *past], strict=True)
            logits, *present = session.run(None, {name: x.numpy() for name, x in inputs})
            past = [torch.from_numpy(x) for x in present]
            output = small(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            real, cache = mask[:, -ids.shape[1] :].bool(), output.past_key_values
            assert (torch.from_numpy(logits) - output.logits)[real].abs().max() <= 1e-5
            ids, places = output.logits[:, -1:].argmax(-1), places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
