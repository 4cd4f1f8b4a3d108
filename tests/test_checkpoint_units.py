"""Checkpoints of channels and sublayers: saved → loaded → same tokens; damaged orders are sentences."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save

from microglia.checkpoint import Checkpoint
from microglia.checkpoint.checkpoint import AGENTS
from microglia.checkpoint.files import replace_all
from microglia.errors import CheckpointError, ConfigError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.policies import new_agents
from microglia.pruner import Pruner
from microglia.signals import usual_signals
from microglia.units import Arrangement, find_sites
from tests.tiny import tiny_tokenizer
from tests.units.many import KINDS, deep_model, shuffled


def agents(model, kind="agents", **parts):
    """Agents whose decisions depend on the prompt, about everything."""
    arrangement = shuffled(model, shared=0.25, protected=(0, -1))
    geometries = [site.geometry for site in find_sites(model, KINDS, arrangement)]
    torch.manual_seed(0)
    policy = new_agents(kind, geometries, signals=usual_signals(KINDS), hidden_dim=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    return Pruner(policy, Gate(bucket=1), units=KINDS, arrangement=arrangement, **parts)


@pytest.mark.parametrize("kind", ["agents", "mixture", "layers"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_loaded_pruner_writes_the_same_tokens(family, kind, tmp_path):
    model, options = deep_model(family), {"max_new_tokens": 8, "min_new_tokens": 8}
    pruner = agents(model, kind)
    Checkpoint.of(model, pruner, base_model="tiny").save_pretrained(tmp_path)
    loaded = Checkpoint.from_pretrained(tmp_path)
    other = deep_model(family)
    loaded.load_onto(other)
    assert loaded.pruner.fingerprint() == pruner.fingerprint()
    assert loaded.pruner.arrangement.protected == (0, -1)
    before = generate(model, tiny_tokenizer(), ["7*8-2=", "a"], pruner, execution="compact", **options)
    after = generate(other, tiny_tokenizer(), ["7*8-2=", "a"], loaded.pruner, execution="masked", **options)
    assert before.tokens.equal(after.tokens)
    assert 0 < float(torch.cat(before.keep, -1).mean()) < 1
    assert "(head, channel, sublayer)" in (tmp_path / "README.md").read_text()


def test_pruners_that_differ_in_their_order_decide_differently():
    model = deep_model("llama")
    pruner = agents(model)
    other = replace(pruner, arrangement=replace(pruner.arrangement, orders=shuffled(model, seed=6).orders))
    assert pruner.fingerprint() != other.fingerprint()


def rewritten(folder, change):
    """The tensors of a checkpoint, changed, under the right checksum."""
    tensors = load_file(folder / AGENTS)
    change(tensors)
    config = Checkpoint.from_pretrained(folder).config
    replace_all(folder, {AGENTS: save(tensors)}, config.to_json, b"", set())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("order.2"), r"order\.2 is no order of 64 channels"),
        (lambda t: t.update({"order.1": torch.zeros(64, dtype=torch.int32)}), r"order\.1 is no order of 64 channels"),
        (lambda t: t.update({"order.1": torch.arange(64)}), r"order\.1 is no order of 64 channels"),
        (lambda t: t.update({"order.9": torch.arange(64, dtype=torch.int32)}), r"order\.9 is unknown"),
    ],
)
def test_damaged_orders_are_refused(change, problem, tmp_path):
    model = deep_model("llama")
    Checkpoint.of(model, agents(model), base_model="tiny").save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint.from_pretrained(tmp_path)


@pytest.mark.parametrize("row", [{"block": "8"}, {"size": 8}, {"protected": [0.5]}, {"protected": 1}, {"shared": 2}])
def test_arrangements_that_cannot_be_are_refused(row):
    with pytest.raises(ConfigError, match="was given; it"):
        Arrangement.of_settings(row)


def test_a_checkpoint_of_heads_says_nothing_new(tmp_path):
    """So that those who read it before still can."""
    model = deep_model("llama")
    policy = new_agents("agents", [site.geometry for site in find_sites(model)], hidden_dim=4)
    Checkpoint.of(model, Pruner(policy), base_model="tiny").save_pretrained(tmp_path)
    assert "arrangement" not in (tmp_path / "microglia_config.json").read_text()
