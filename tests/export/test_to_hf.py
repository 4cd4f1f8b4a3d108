"""A frozen model on disk is the compacted model: logits, tokens, sizes, with and without microglia."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from microglia.errors import CheckpointError, ConfigError, UnsupportedModelError
from microglia.export import FORMATS, KeepPlan, export, modeling_microglia, modeling_microglia_gpt2
from microglia.export.frozen import frozen, merged
from microglia.export.unfused import unfused_config
from microglia.models import load_model
from microglia.training.lora import with_lora
from microglia.units import find_sites
from tests.export.plans import uneven_plan
from tests.full_disk import room_for
from tests.tiny import positions, tiny_model, tiny_prompts, tiny_tokenizer

IDS, MASK = tiny_prompts(9, 4)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=MASK, position_ids=positions(MASK)).logits


def tokens(model, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=IDS, attention_mask=MASK, **options)


@pytest.fixture
def written(family, tmp_path):
    model = tiny_model(family)
    plan = uneven_plan(model)
    return model, plan, export(model, tiny_tokenizer(), plan, tmp_path / "exported")


def test_reloaded_is_the_compacted_model_and_really_smaller(written, family):
    model, plan, exported = written
    before = logits(model)
    again = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True)
    with frozen(model, plan) as small:
        difference = (logits(again) - logits(small)).abs().max()
        assert difference <= (1e-6 if family == "phi3" else 0)  # Phi-3: three products for one round differently
        assert torch.equal(tokens(again), tokens(small))
        assert torch.equal(tokens(again, cache_implementation="static"), tokens(small))
        sizes = [x.numel() for x in small.parameters()]
    assert torch.equal(logits(model), before)  # the model itself was not changed
    assert exported.difference <= (1e-6 if family == "phi3" else 0)
    on_disk = load_file(exported.folder / "model.safetensors")
    assert sum(x.numel() for x in on_disk.values()) == exported.parameters == sum(sizes) < exported.dense_parameters
    rows = json.loads((exported.folder / "config.json").read_text())["per_layer_config"]
    assert [rows[str(i)]["num_attention_heads"] for i in range(2)] == [int(k.sum()) for k in plan.keep]


def test_an_export_opens_in_microglia_and_is_exported_again(written, tmp_path):
    _, plan, exported = written
    again, tokenizer = load_model(exported.folder, trust_remote_code=True)
    sites = find_sites(again)
    assert [site.geometry.heads for site in sites] == [int(k.sum()) for k in plan.keep]
    whole = KeepPlan("mean", tuple(torch.ones(s.geometry.heads) for s in sites), 1, 0.0, 1.0)
    second = export(again, tokenizer, whole, tmp_path / "second")
    third = AutoModelForCausalLM.from_pretrained(second.folder, trust_remote_code=True)
    assert torch.equal(logits(third), logits(again))


def test_the_folder_needs_no_microglia(tmp_path):
    model = tiny_model("qwen2")
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", check=False)
    assert exported.difference is None
    script = (
        "import sys; sys.modules['microglia'] = None\n"
        "import torch; from transformers import AutoModel, AutoModelForCausalLM\n"
        "lm = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "decoder = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"  # what vLLM's back end loads
        "ids = torch.arange(1, 9)[None]\n"
        "assert torch.equal(lm.model(ids).last_hidden_state, decoder(ids).last_hidden_state)\n"
        "print(lm(ids).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported.folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    with frozen(model, uneven_plan(model)) as small, torch.no_grad():
        expected = small(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-3)


def test_another_attention_back_end_reaches_every_layer(tmp_path):
    model = tiny_model("llama", backend="eager")
    plan = uneven_plan(model)
    folder = export(model, tiny_tokenizer(), plan, tmp_path / "exported", check=False).folder
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    again.set_attn_implementation("sdpa")  # a copied config would stay eager and meet masks made for sdpa
    with frozen(model, plan) as small:
        real = MASK.bool()
        assert torch.allclose(logits(again)[real], logits(small)[real], atol=1e-5)


@pytest.mark.parametrize(("source", "family"), [(modeling_microglia, "llama"), (modeling_microglia_gpt2, "gpt2")])
def test_a_transformers_that_reads_no_head_counts_per_layer_is_named(source, family):
    with pytest.raises(ImportError, match=r"older than 5\.14; upgrade it"):
        source.MicrogliaForCausalLM(tiny_model(family).config)


def test_lora_is_in_the_written_weights(tmp_path):
    model = with_lora(tiny_model("llama"), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    plan = uneven_plan(model)
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True)
    with frozen(model, plan) as small:
        assert torch.allclose(logits(again), logits(small), atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(logits(again), logits(model), atol=1e-2)


def test_tied_weights_are_written_once(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported")
    assert "lm_head.weight" not in load_file(exported.folder / "model.safetensors")


def test_bfloat16_stays_bfloat16(tmp_path):
    model = tiny_model("mistral", dtype=torch.bfloat16)
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True)
    assert again.dtype == torch.bfloat16


def test_what_cannot_be_written_is_refused(tmp_path):
    model = tiny_model("llama")
    plan, tokenizer = uneven_plan(model), tiny_tokenizer()
    with pytest.raises(ConfigError, match="format='pickle' is unknown; choose one of hf, onnx, gguf"):
        export(model, tokenizer, plan, tmp_path / "a", format="pickle")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, not an earlier export"):
        export(model, tokenizer, plan, tmp_path)
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="is offloaded"):
        merged(type(model)(model.config))
    long = tiny_model("phi3").config
    long.rope_parameters = {**long.rope_parameters, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match=r"turns 0\.5 of a head"):
        unfused_config(long, head_dim=6)


@pytest.mark.parametrize("wrong", [{"temperature": 0.7, "top_p": 0.9}, {"length_penalty": 2.0}, {"pad_token_id": -1}])
def test_generation_settings_without_effect_are_left_out(wrong, tmp_path):
    model = tiny_model("llama")
    settings = model.generation_config
    settings.update(**wrong, repetition_penalty=1.5)
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True).generation_config
    again.validate(strict=True)
    assert (again.repetition_penalty, again.eos_token_id) == (1.5, 1)
    assert all(getattr(settings, name) == value for name, value in wrong.items())  # the model's own are as they were


def test_generation_settings_that_nothing_can_use_are_refused_and_nothing_stays(tmp_path):
    model = tiny_model("llama")
    model.generation_config.num_return_sequences = 3
    folder = tmp_path / "new" / "exported"
    with pytest.raises(UnsupportedModelError, match=r"generation_config cannot be written \(Greedy methods"):
        export(model, tiny_tokenizer(), uneven_plan(model), folder)
    assert not folder.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_the_folder_as_it_was(format, tmp_path, monkeypatch):
    def fail(_, place, **__):
        (place / "tokenizer.json" if place.is_dir() else place).write_text("half")
        raise KeyError("raw")

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plan, folder = uneven_plan(model), tmp_path / "exported"
    export(model, tokenizer, plan, folder, check=False)
    (folder / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if format == "hf":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    elif format == "onnx":
        monkeypatch.setattr("microglia.export.to_onnx._save", fail)
    else:
        monkeypatch.setattr("microglia.export.to_gguf._difference", lambda *_: {}["raw"])
    for target in (folder, tmp_path / "other"):
        with pytest.raises(KeyError, match="raw"):
            export(model, tokenizer, plan, target, format=format)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "other").exists()


def test_a_full_disk_is_one_sentence(tmp_path):
    model = tiny_model("llama")
    with room_for(4096), pytest.raises(CheckpointError, match=r"exported cannot be written \(.*; make room"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_a_killed_export_left_is_no_hindrance(tmp_path):
    model, folder = tiny_model("llama"), tmp_path / "exported"
    (folder / ".unfinished").mkdir(parents=True)
    (folder / ".unfinished" / "model.safetensors").write_bytes(b"half")
    exported = export(model, tiny_tokenizer(), uneven_plan(model), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*exported.files, "microglia_export.json"])


def test_files_in_folders_are_written_and_replaced_and_nothing_outside_is(tmp_path):
    model, tokenizer, folder = tiny_model("llama"), tiny_tokenizer(), tmp_path / "exported"
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    first = export(model, tokenizer, uneven_plan(model), folder)
    assert "additional_chat_templates/tool.jinja" in first.files
    record = json.loads((folder / "microglia_export.json").read_text())
    record["files"].append("../outside.txt")
    (folder / "microglia_export.json").write_text(json.dumps(record))
    (tmp_path / "outside.txt").write_text("kept")
    export(model, tiny_tokenizer(), uneven_plan(model), folder)
    assert not (folder / "additional_chat_templates").exists()
    assert (tmp_path / "outside.txt").read_text() == "kept"


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    model = tiny_model("llama")
    plan, tokenizer, folder = uneven_plan(model), tiny_tokenizer(), tmp_path / "exported"
    first = export(model, tokenizer, plan, folder, check=False)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    record = json.loads((folder / "microglia_export.json").read_text())
    record["files"].append("model-00001-of-00002.safetensors")
    (folder / "microglia_export.json").write_text(json.dumps(record))
    (folder / "mine.txt").write_text("kept")
    second = export(model, tokenizer, plan, folder, check=False)
    assert second.files == first.files
    assert sorted(path.name for path in folder.iterdir()) == sorted([*first.files, "mine.txt", "microglia_export.json"])
