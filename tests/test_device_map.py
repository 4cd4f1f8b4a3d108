"""Models that transformers spreads by `device_map`, in part on disk: they answer, and they say what they cannot do."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from microglia.errors import ConfigError
from microglia.system import MicrogliaPruningSystem
from microglia.training import TrainingConfig
from tests.tiny_folder import character_tokenizer, checkpoint_for, save_tiny_model
from tests.training.test_training import tiny_run, trained_policy

PROMPTS = ["Tom has 3 apples.", "Ann buys 12 pens and gives 5 of them away."]
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "one device": {"": "cpu"},
    "a layer on disk": {name: "disk" if name == "model.layers.1" else "cpu" for name in PARTS},
}
FEW = TrainingConfig(max_steps=2, batch_size=4, limit=8, eval_limit=4, warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_a_spread_model_answers_like_a_whole_one(folder, tmp_path, kind, execution):
    tokenizer = character_tokenizer()
    whole = AutoModelForCausalLM.from_pretrained(folder)
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=MAPS[kind], offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in spread.parameters()) == (kind == "a layer on disk")
    checkpoint_for(whole).save_pretrained(tmp_path / "checkpoint")
    results = []
    for model in (whole, spread):
        system = MicrogliaPruningSystem.from_pretrained(tmp_path / "checkpoint", model, tokenizer=tokenizer)
        answers = system.generate(PROMPTS, 8, execution=execution)
        results.append((answers, system.get_sparsities(), system.explain(PROMPTS[0]).keep_ratio))
    assert results[1] == results[0]
    assert 0 < results[0][2] < 1


def test_a_model_with_a_device_map_is_trained(folder, tmp_path):
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    policies = [trained_policy(tmp_path / str(i), FEW, model=model) for i, model in enumerate((None, spread))]
    for a, b in zip(*(policy.state_dict().values() for policy in policies), strict=True):
        torch.testing.assert_close(a, b)


def test_an_offloaded_model_is_not_trained(folder, tmp_path):
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS["a layer on disk"], offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ConfigError, match=r"weights of this model are offloaded.* with shard=True"):
        tiny_run(tmp_path / "run", FEW, model=spread)
