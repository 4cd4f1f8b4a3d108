"""A GGUF file in, a plain model out: what its tensors say, once, with the tokenizer, the template and the ends."""

import json
import shutil

import pytest
import torch

from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.models import load_model, source_of
from microglia.system import MicrogliaPruningSystem

pytest.importorskip("gguf", reason="gguf is not installed; pip install microglia[gguf]")

from tests.tiny_gguf import CHAT, Kind, byte_tokenizer, tiny_source, write_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("MICROGLIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", Kind.F16), ("qwen2", Kind.F32), ("llama", Kind.Q4_0), ("qwen2", Kind.Q8_0)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_file_loads_as_what_its_tensors_say(family, kind, tmp_path):
    """Against llama.cpp's own dequantisation: floats exactly, quantised matrices to float16's half a unit."""
    model = tiny_source(family, tie_word_embeddings=False)
    held = write_tiny_gguf(tmp_path / "a.gguf", model, matrices=kind)
    lm, _ = load_model(tmp_path / "a.gguf", device="cpu")
    assert lm.dtype == torch.float32
    assert not getattr(lm, "is_quantized", False)
    loaded = lm.state_dict()
    assert loaded.keys() == held.keys()
    for name, tensor in held.items():
        room = 2**-11 * tensor.abs() + 2**-25 if kind in (Kind.Q8_0, Kind.Q4_0) and tensor.dim() > 1 else 0
        assert ((loaded[name] - tensor).abs() <= room).all(), name


def test_logits_and_answers_are_those_of_the_source(tmp_path):
    model = tiny_source("llama", tie_word_embeddings=True)
    write_tiny_gguf(tmp_path / "a.gguf", model)
    lm, tokenizer = load_model(f"{tmp_path}::a.gguf", device="cpu")
    ids = tokenizer("What is 1 + 1?", return_tensors="pt").input_ids
    assert torch.equal(ids, byte_tokenizer()("What is 1 + 1?", return_tensors="pt").input_ids)
    assert lm.config.tie_word_embeddings
    torch.testing.assert_close(lm(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_comes_out_can_be_saved_and_loaded_again(tmp_path):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("qwen2"), matrices=Kind.Q8_0)
    lm, tokenizer = load_model(tmp_path / "a.gguf", device="cpu")
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved", device="cpu")
    assert all(torch.equal(tensor, lm.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_template_ends_and_splits_survive(tmp_path):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama", tie_word_embeddings=True), matrices=Kind.Q4_0)
    lm, tokenizer = load_model(tmp_path / "a.gguf", device="cpu")
    assert tokenizer.chat_template == CHAT
    assert lm.generation_config.eos_token_id == [2, 0]  # <|im_end|>, which the file names, and <|endoftext|>
    texts = ("one\n\n2 and 34", "  7", "\n\n\n8<|im_end|>x")
    assert [tokenizer(text).input_ids for text in texts] == [byte_tokenizer()(text).input_ids for text in texts]


def test_of_two_roundings_of_one_matrix_the_finer_is_taken_for_both(tmp_path):
    model = tiny_source("qwen2", tie_word_embeddings=True)
    for name, kinds in {"head": (Kind.Q4_0, Kind.Q8_0), "embeddings": (Kind.Q8_0, Kind.Q4_0)}.items():
        file = tmp_path / f"{name}.gguf"
        held = write_tiny_gguf(file, model, matrices=kinds[0], head=kinds[1])
        lm, _ = load_model(file, device="cpu")
        assert lm.config.tie_word_embeddings
        assert lm.lm_head.weight is lm.model.embed_tokens.weight
        finer = held["lm_head.weight" if name == "head" else "model.embed_tokens.weight"]
        torch.testing.assert_close(lm.lm_head.weight.data, finer.half().float(), atol=0, rtol=0)


def test_a_head_of_its_own_stays_one(tmp_path):
    model = tiny_source("llama", tie_word_embeddings=False)
    write_tiny_gguf(tmp_path / "a.gguf", model, matrices=Kind.Q8_0)
    lm, _ = load_model(tmp_path / "a.gguf", device="cpu")
    assert not lm.config.tie_word_embeddings
    assert not torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("kind", "stored", "wanted"),
    [
        (Kind.F32, torch.float32, "float32"),
        (Kind.BF16, torch.bfloat16, "bfloat16"),
        (Kind.Q8_0, torch.float16, "bfloat16"),  # what such models were trained in
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_matrices_are_stored_so_that_nothing_is_lost_that_matters(kind, stored, wanted, cache, tmp_path):
    from safetensors.torch import load_file

    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"), matrices=kind)
    load_model(tmp_path / "a.gguf", device="cpu")
    (folder,) = (cache / "models").iterdir()
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.dim() > 1} == {stored}
    assert {t.dtype for t in tensors.values() if t.dim() == 1} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == wanted
    lm, _ = load_model(folder, dtype="auto", device="cpu")
    assert lm.dtype == getattr(torch, wanted)


def test_a_number_beyond_float16_is_kept(tmp_path):
    model = tiny_source("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3e5
    held = write_tiny_gguf(tmp_path / "a.gguf", model, matrices=Kind.Q4_0)
    lm, _ = load_model(tmp_path / "a.gguf", device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(lm.state_dict()[name], held[name])


def test_the_second_time_the_cache_is_used(tmp_path, cache, monkeypatch):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"), **{"general.license": "apache-2.0"})
    first, _ = load_model(tmp_path / "a.gguf", device="cpu")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "same.gguf")
    monkeypatch.setattr("microglia.catalogue.gguf._read", lambda file: pytest.fail("it was dequantised again"))
    for name in ("a", "same"):
        again, _ = load_model(tmp_path / f"{name}.gguf", device="cpu")
        assert all(torch.equal(tensor, first.state_dict()[key]) for key, tensor in again.state_dict().items())
    (folder,) = (cache / "models").iterdir()
    row = json.loads((folder / "source.json").read_text())
    assert folder.name == f"a-{row['sha256'][:12]}"
    assert row["licence"] == "apache-2.0"
    assert row["model"] == row["source"] == str(tmp_path / "a.gguf")
    assert row["bytes"] == (tmp_path / "a.gguf").stat().st_size


def test_what_was_interrupted_is_done_again(tmp_path, cache, monkeypatch):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            load_model(tmp_path / "a.gguf", device="cpu")
    assert [*(cache / "models").iterdir()] == []
    killed = cache / "models" / "a-without-source"  # a process that was killed leaves what it had
    killed.mkdir()
    load_model(tmp_path / "a.gguf", device="cpu")


def test_a_folder_that_says_nothing_of_its_source_is_replaced(tmp_path, cache):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"))
    load_model(tmp_path / "a.gguf", device="cpu")
    (folder,) = (cache / "models").iterdir()
    (folder / "source.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    lm, _ = load_model(tmp_path / "a.gguf", device="cpu")
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]
    assert source_of(lm) == str(tmp_path / "a.gguf")


def test_a_checkpoint_names_the_file_and_is_loaded_with_it(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama", tie_word_embeddings=True), matrices=Kind.Q8_0)
    few = {"max_steps": 1, "batch_size": 2, "limit": 2, "eval_limit": 2}
    system = MicrogliaPruningSystem(tmp_path / "a.gguf", hidden_dim=8)
    system.train(output_dir=tmp_path / "run", quiet=True, **few)
    assert system.checkpoint().config.base_model == str(tmp_path / "a.gguf")
    again = MicrogliaPruningSystem.from_pretrained(tmp_path / "run")
    assert again.generate("1 + 1 =", 4) == system.generate("1 + 1 =", 4)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{}/nowhere.gguf",
            r"there is no file .*nowhere\.gguf; give a hub id, a local folder, a GGUF file or one of rea",
        ),
        ("{}::nowhere.gguf", r"there is no file .*nowhere\.gguf"),
        ("{}::a.bin", r"a\.bin names no GGUF file; give FOLDER::FILE\.gguf"),
        ("{}/text.gguf", r"text\.gguf is no GGUF file, or is damaged \(.*\); fetch or copy it again"),
        ("{}/cut.gguf", r"cut\.gguf is no GGUF file, or is damaged"),
    ],
)
def test_what_is_no_model_is_refused(source, sentence, tmp_path):
    write_tiny_gguf(tmp_path / "whole.gguf", tiny_source("llama"))
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(MicrogliaError, match=sentence):
        load_model(source.format(tmp_path), device="cpu")


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "starfish")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(
        UnsupportedModelError, match=r"transformers cannot read .*a\.gguf \(.*starfish.*\); give a file"
    ):
        load_model(tmp_path / "a.gguf", device="cpu")


def test_a_file_with_half_of_a_model_is_refused(tmp_path):
    model = tiny_source("llama")
    model.config.num_hidden_layers = 3
    write_tiny_gguf(tmp_path / "a.gguf", model)
    with pytest.raises(
        MicrogliaError, match=r"a\.gguf lacks model\.layers\.2\..* and \d+ more; give a file that holds"
    ):
        load_model(tmp_path / "a.gguf", device="cpu")


def test_a_file_with_weights_that_transformers_drops_is_refused(tmp_path):
    """It reads no biases of a Llama's attention and says nothing; the model would be another one."""
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama", attention_bias=True))
    with pytest.raises(UnsupportedModelError, match=r"a\.gguf holds [\d,]+ weights, but the LlamaForCausalLM that"):
        load_model(tmp_path / "a.gguf", device="cpu")


def test_without_gguf_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MicrogliaError, match=r"a GGUF file needs gguf, .*; pip install 'microglia\[gguf\]'"):
        load_model(tmp_path / "a.gguf", device="cpu")


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_source("llama"))
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MICROGLIA_CACHE", str(tmp_path / "taken"))
    with pytest.raises(
        MicrogliaError, match=r"taken.* cannot be written \(.*\); name another folder in MICROGLIA_CACHE"
    ):
        load_model(tmp_path / "a.gguf", device="cpu")
