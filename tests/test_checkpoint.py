"""Checkpoints: what was saved is what is loaded, damage is named, and no crash loses the previous one."""

import os
import re
import shutil
from functools import partial

import pytest
import torch

from microglia.checkpoint import CONFIG, Checkpoint, MicrogliaConfig, check_writable
from microglia.errors import CheckpointError, ConfigError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.models import load_model
from microglia.policies import CodebookPolicy, MixturePolicy, Policy, PredictorPolicy, SignalPolicy, StaticPolicy
from microglia.pruner import Budget, Pruner
from microglia.training.lora import with_lora
from tests.tiny import Fixed, geometries_of, tiny_model
from tests.tiny_folder import character_tokenizer, checkpoint_for

PROMPTS = ["Tom has 3 apples.", "Ann buys 12 pens and gives 5 of them away. How many are left?", "1 + 1 ="]
AGENTS = "agents.safetensors"


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=99, max_position_embeddings=512)


@pytest.fixture
def folder(model, tmp_path):
    return checkpoint_for(model).save_pretrained(tmp_path / "saved")


def same_state(a: Policy, b: Policy) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def answers(model, saved):
    return generate(model, character_tokenizer(), PROMPTS, saved.pruner, max_new_tokens=12)


# --- round trip ------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_decides_and_answers_the_same(model, tmp_path):
    parts = {"gate": Gate(threshold=0.25, temperature=0.7, bucket=2), "window": 5, "fill": "mean"}
    weights = torch.tensor([1.0, 2.0, 30.0, 4.0, 5.0])
    budget = Budget([torch.randn(5, 8), torch.randn(5, 8)], geometries_of(model), bucket=2, weights=weights)
    described = {"template": "Q: {question}", "training": {"dataset": "arithmetic"}}
    saved = checkpoint_for(model, budget=budget, **described, **parts)
    loaded = Checkpoint.from_pretrained(saved.save_pretrained(tmp_path))

    assert loaded.config == saved.config
    assert {name: getattr(loaded.pruner, name) for name in parts} == parts
    assert same_state(loaded.pruner.policy, saved.pruner.policy)
    assert all(torch.equal(a, b) for a, b in zip(loaded.pruner.budget.logits, budget.logits, strict=True))
    assert (loaded.pruner.budget.geometries, loaded.pruner.budget.bucket) == (budget.geometries, 2)
    assert loaded.pruner.budget.weights.equal(weights)
    assert loaded.pruner.budget.threshold(0.6) == budget.threshold(0.6)
    assert loaded.pruner.fingerprint() == saved.pruner.fingerprint()
    before, after = answers(model, saved), answers(model, loaded)
    assert 0 < sum(float(k.mean()) for k in before.keep) < len(before.keep)
    assert all(torch.equal(a, b) for a, b in zip(before.keep, after.keep, strict=True))
    assert torch.equal(before.tokens, after.tokens)


def test_every_family_comes_back_from_the_disk_the_same(family, tmp_path):
    """Base model, tokenizer and checkpoint: another process would decide and write the same."""
    model = tiny_model(family, vocab_size=99, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "base")
    saved = checkpoint_for(model, gate=Gate(threshold=0.4, bucket=1))
    loaded = Checkpoint.from_pretrained(saved.save_pretrained(tmp_path / "agents"))
    fresh = loaded.load_onto(load_model(tmp_path / "base", tokenizer=character_tokenizer(), device="cpu")[0])
    before, after = answers(model, saved), answers(fresh, loaded)
    assert 0 < sum(float(k.mean()) for k in before.keep) < len(before.keep)
    assert all(torch.equal(a, b) for a, b in zip(before.keep, after.keep, strict=True))
    assert torch.equal(before.tokens, after.tokens)


MAKERS = {
    "static": partial(StaticPolicy.random, seed=3),
    "mixture": partial(MixturePolicy, hidden_dim=3),
    "codebook": partial(CodebookPolicy, hidden_dim=3),
    "predictor": partial(PredictorPolicy, hidden_dim=5, signals=("entropy",)),
    "signal": lambda geometries: SignalPolicy("entropy"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_policy_comes_back_as_what_it_was(model, tmp_path, kind):
    policy = MAKERS[kind](geometries_of(model))
    Checkpoint.of(model, Pruner(policy)).save_pretrained(tmp_path)
    loaded = Checkpoint.from_pretrained(tmp_path).pruner.policy
    assert type(loaded) is type(policy)
    assert (loaded.signals, loaded.options()) == (policy.signals, policy.options())
    assert same_state(loaded, policy)


def test_a_policy_of_another_kind_cannot_be_saved(model):
    other = Fixed.create(geometries_of(model), ())
    with pytest.raises(ConfigError, match=r"a Fixed cannot be saved; only registered policies can, agents, mixture"):
        MicrogliaConfig.describing(model, Pruner(other))


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_the_adapter_travels_with_the_agents(model, tmp_path):
    wrapped = with_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    saved = checkpoint_for(wrapped)
    with pytest.raises(CheckpointError, match=r"its adapter must be saved too; pass model="):
        saved.save_pretrained(tmp_path / "forgotten")
    saved.save_pretrained(tmp_path / "a", wrapped)
    loaded = Checkpoint.from_pretrained(tmp_path / "a")
    again = Checkpoint.from_pretrained(loaded.save_pretrained(tmp_path / "b"))

    plain = tiny_model("llama", vocab_size=99, max_position_embeddings=512)
    ids = torch.tensor([[5, 6, 7]])
    dense = plain(ids).logits
    adapted = again.load_onto(plain)
    assert torch.equal(adapted(ids).logits, wrapped(ids).logits)
    assert not torch.equal(adapted(ids).logits, dense)
    with pytest.raises(CheckpointError, match=r"this checkpoint brings its own; give the base model"):
        again.load_onto(adapted)

    (tmp_path / "b" / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "b" / "adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"lacks adapter/adapter_model\.safetensors \(adapter_model\.bin may hold"
    ):
        Checkpoint.from_pretrained(tmp_path / "b")
    checkpoint_for(tiny_model("llama")).save_pretrained(tmp_path / "a")
    assert not list((tmp_path / "a" / "adapter").iterdir())


def test_a_model_that_does_not_fit_hears_every_difference_at_once(folder):
    other = tiny_model("qwen2", num_hidden_layers=3, num_attention_heads=12, hidden_size=96)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_pretrained(folder).load_onto(other)
    sentence = str(caught.value)
    for difference in (
        "made on tiny",
        "its class is Qwen2ForCausalLM, not LlamaForCausalLM",
        "it has 3 sites, not 2",
        "heads is 12, not 8 (sites 0, 1)",
        "kv_heads is 4, not 8 (sites 0, 1)",
        "head_dim is 8, not 6 (sites 0, 1)",
    ):
        assert difference in sentence
    Checkpoint.from_pretrained(folder).check(tiny_model("llama", seed=7))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 6))
def test_a_save_that_dies_leaves_the_old_or_the_new_one_whole(model, tmp_path, monkeypatch, step):
    old, new = checkpoint_for(model, seed=1), checkpoint_for(model, seed=2, fill="mean")
    old.save_pretrained(tmp_path)
    real, calls = os.replace, []

    def dies(*args):
        calls.append(args)
        if len(calls) == step:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr("microglia.checkpoint.files.os.replace", dies)
    if step < 5:
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    else:
        new.save_pretrained(tmp_path)
        assert len(calls) == 4  # agents, configuration, agents into place, card: no step was left out
    monkeypatch.undo()

    expected = old if step <= 2 else new
    loaded = Checkpoint.from_pretrained(tmp_path)
    assert loaded.config == expected.config
    assert same_state(loaded.pruner.policy, expected.pruner.policy)
    assert same_state(Checkpoint.from_pretrained(old.save_pretrained(tmp_path)).pruner.policy, old.pruner.policy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", AGENTS, CONFIG]


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for write in (checkpoint_for(model).save_pretrained, check_writable):
        with pytest.raises(CheckpointError, match=r"nothing can be written to .*file.*; choose another folder"):
            write(tmp_path / "file" / "below")


def test_a_policy_of_nan_is_not_saved_over_a_good_one(model, folder):
    bad = checkpoint_for(model, seed=4)
    bad.pruner.policy.state_dict()["statistics.0.mean"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"statistics\.0\.mean holds NaN .* train at a lower learning rate"):
        bad.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"cannot be written as JSON"):
        checkpoint_for(model, training={"loss": float("nan")}).save_pretrained(folder)
    Checkpoint.from_pretrained(folder)


def test_the_card_says_what_this_is_and_spares_other_readmes(model, folder):
    card = (folder / "README.md").read_text()
    assert "library_name: microglia" in card
    assert re.search(r"\| policy \| input-adaptive agents, [\d,]+ parameters \([\d.]+% of the base model\) \|", card)
    (folder / "README.md").write_text("# My project\n")
    checkpoint_for(model).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# My project\n"


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_gets_the_folder_and_gives_it_back(model, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token): ...

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(tmp_path / repo_id))
    saved = checkpoint_for(model)
    assert saved.push_to_hub("me/agents") == "https://hub/me/agents"
    assert same_state(Checkpoint.from_pretrained("me/agents").pruner.policy, saved.pruner.policy)

    def refused(*_, **__):
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr(Hub, "create_repo", refused)
    with pytest.raises(CheckpointError, match=r"no checkpoint folder me/agents, nor .* the hub \(no network\); give"):
        Checkpoint.from_pretrained("me/agents")
    with pytest.raises(CheckpointError, match=r"could not be pushed to 'me/agents' \(no network\)"):
        saved.push_to_hub("me/agents")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint folder runs/nothing/; give one"):
        Checkpoint.from_pretrained("runs/nothing/")
