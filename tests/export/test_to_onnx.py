"""ONNX Runtime and torch agree on the frozen model: logits to 1e-5, greedy tokens exactly."""

import pytest
import torch

from microglia.errors import ConfigError
from microglia.export import KeepPlan, export
from microglia.export.frozen import frozen
from microglia.export.to_onnx import empty_past, run_step
from microglia.models import load_model
from microglia.units import find_sites
from tests.export.plans import uneven_plan
from tests.tiny import positions, tiny_model, tiny_prompts, tiny_tokenizer

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
