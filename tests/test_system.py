"""The façade: the whole life of a pruned model on a tiny random one."""

import json

import pytest
import torch

from microglia.errors import CheckpointError, ConfigError, DataError, MicrogliaError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.pruner import Pruner
from microglia.reading import read_prompts
from microglia.results import Difference, EvaluationResult, from_json, plain
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.tasks.prompts import render_prompt
from tests.tiny import tiny_model
from tests.tiny_folder import character_tokenizer, opinionated, save_tiny_model

QUESTIONS = ["Tom has 3 apples.", "Ann buys 12 pens and gives 5 of them to Leo. How many pens are left?", "1 + 1 ="]
QUICK = {"max_steps": 2, "limit": 4, "batch_size": 2, "eval_limit": 2, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def system(folder):
    system = MicrogliaPruningSystem(str(folder), num_heads=8, hidden_dim=16)
    opinionated(system.pruner.policy)
    return system


def logits_of(system, questions):
    """What the policy says of the questions as the system asks them, (N, H) per site."""
    prompts = [render_prompt(system.tokenizer, question, system.template) for question in questions]
    return read_prompts(system.model, system.tokenizer, prompts, system.pruner).logits


def test_the_interface_of_the_design(folder, tmp_path):
    system = MicrogliaPruningSystem(model=str(folder), num_heads=8, hidden_dim=16)
    result = system.train(
        dataset_name="arithmetic", num_epochs=1, alpha_schedule=(0.01, 0.3), output_dir=tmp_path, **QUICK
    )
    assert result.history[-1]["step"] == 2
    assert system.training["dataset"] == "arithmetic"
    assert system.training["config"]["alpha"] == (0.01, 0.3)
    assert [tuple(x.shape) for x in system.pruner.budget.logits] == [(64, 8), (64, 8)]
    assert isinstance(system.generate("What is 15% of 240?", 4), str)
    assert 0 <= system.get_sparsity() < 1
    results = system.evaluate(dataset_name="arithmetic", limit=3, max_new_tokens=4)
    assert isinstance(results, EvaluationResult)
    assert results["accuracy"] == results.accuracy == results.pruned.accuracy
    assert results.pruned.prompts == results.dense.prompts == len(results.answers["dense"]) == 3
    assert isinstance(results.paired, Difference)
    assert plain(results.paired).keys() == {"diff", "ci95", "p_value"}
    assert results.paired.diff == pytest.approx(results.pruned.accuracy - results.dense.accuracy)
    assert results.sparsity == pytest.approx(system.get_sparsity())
    assert from_json(json.loads(json.dumps(results.to_json()))).pruned == results.pruned

    loaded = MicrogliaPruningSystem.from_pretrained(tmp_path)
    assert loaded.training["dataset"] == "arithmetic"
    assert loaded.source == str(folder)


def test_the_agents_start_the_same_for_a_seed_and_disturb_no_other_randomness(folder):
    model, tokenizer = tiny_model("llama"), character_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (MicrogliaPruningSystem(model, tokenizer=tokenizer, seed=s).pruner.policy for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [p.agents[0].network[0].weight for p in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_saved_and_loaded_answers_the_same(system, tmp_path):
    system.set_keep_ratio(0.6, QUESTIONS)
    answers, sparsities = system.generate(QUESTIONS, 12), system.get_sparsities()
    assert 0 < min(sparsities) <= max(sparsities) < 1
    system.save_pretrained(tmp_path)
    loaded = MicrogliaPruningSystem.from_pretrained(tmp_path)
    assert loaded.generate(QUESTIONS, 12) == answers
    assert loaded.get_sparsities() == sparsities
    onto = MicrogliaPruningSystem.from_pretrained(tmp_path, system.model, tokenizer=system.tokenizer)
    assert onto.generate(QUESTIONS, 12) == answers
    assert onto.generate(QUESTIONS, 12, keep_ratio=0.9) == system.generate(QUESTIONS, 12, keep_ratio=0.9)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_lora_is_trained_saved_and_loaded(folder, tmp_path):
    system = MicrogliaPruningSystem(str(folder), hidden_dim=16)
    system.train(lora="joint", lora_rank=2, output_dir=tmp_path, **QUICK)
    loaded = MicrogliaPruningSystem.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, system.model(ids).logits)
    assert loaded.generate(QUESTIONS, 6) == system.generate(QUESTIONS, 6)
    assert loaded.checkpoint().config.lora


def test_generate_wraps_the_question_as_training_does(system):
    answers = system.generate(QUESTIONS, 8)
    assert [system.generate(question, 8) for question in QUESTIONS] == answers
    prompts = [render_prompt(system.tokenizer, question, system.template) for question in QUESTIONS]
    assert system.generate(prompts, 8, raw=True) == answers
    assert system.generate(QUESTIONS, 8, execution="masked") == answers
    dense = generate(system.model, system.tokenizer, prompts, max_new_tokens=8).texts
    assert system.generate(QUESTIONS, 8, execution="dense") == [text.strip() for text in dense]
    assert system.get_sparsities() == [0, 0, 0]


def test_a_keep_ratio_is_the_mean_and_leaves_prompts_different(system):
    questions = [example.question for example in get_task("arithmetic").load("test", limit=12)]
    kept = []
    for ratio in (0.5, 0.75, 1.0):
        system.set_keep_ratio(ratio, questions)
        system.generate(questions, 1)
        kept.append(1 - system.get_sparsity())
        assert kept[-1] == pytest.approx(ratio, abs=0.1)
    assert kept == sorted(kept)
    system.set_keep_ratio(0.75)
    system.generate(questions, 1)
    assert len(set(system.get_sparsities())) > 1
    before = system.get_sparsity()
    system.generate(questions, 1, keep_ratio=1.0)  # this time only
    assert system.get_sparsity() < 0.02
    system.generate(questions, 1)
    assert system.get_sparsity() == before
    assert system.set_keep_ratio(None) == 0.0


def test_the_calibration_is_what_generation_decides_on(system):
    system.set_keep_ratio(None, QUESTIONS)
    logits = system.pruner.budget.logits
    for index, question in enumerate(QUESTIONS):  # alone, so padding has no say
        alone = logits_of(system, [question])
        for site, whole in zip(alone, logits, strict=True):
            torch.testing.assert_close(site[0], whole[index], rtol=0, atol=1e-4)


def test_what_a_user_gets_wrong_is_said_in_a_sentence(system, folder, tmp_path):
    with pytest.raises(MicrogliaError, match=r"no prompt was read yet.*call generate or evaluate first"):
        system.get_sparsity()
    with pytest.raises(ConfigError, match=r"num_heads=32 was given, but the model has 8 heads"):
        MicrogliaPruningSystem(str(folder), num_heads=32)
    with pytest.raises(ConfigError, match=r"bucket=8 was given, but a site has 8 units, all of which would always be"):
        MicrogliaPruningSystem(str(folder), bucket=8)
    with pytest.raises(ConfigError, match=r"signals='x' is unknown; choose norm, entropy, "):
        MicrogliaPruningSystem(str(folder), signals=["x"])
    with pytest.raises(ConfigError, match=r"training has no option learn_rate; choose from epochs"):
        system.train(learn_rate=1.0)
    with pytest.raises(ConfigError, match=r"no task 'gsm9k'; choose one of arithmetic"):
        system.train("gsm9k")
    with pytest.raises(DataError, match=r"prompt 1 of 2 is empty"):
        system.generate(["1 + 1", " \n"])
    with pytest.raises(DataError, match=r"no prompt was given"):
        system.generate([])
    with pytest.raises(DataError, match=r"but the model's context is 2048"):
        system.generate("x" * 2100)
    with pytest.raises(ConfigError, match=r"execution='quick' is unknown"):
        system.generate("1 + 1", execution="quick")
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 was given, but there are no prompts to calibrate"):
        system.generate("1 + 1", keep_ratio=0.5)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"nothing can be written to"):
        system.train(output_dir=tmp_path / "file", **QUICK)


def test_a_checkpoint_of_a_model_in_memory_asks_for_it(tmp_path):
    system = MicrogliaPruningSystem(tiny_model("llama", vocab_size=99), tokenizer=character_tokenizer())
    system.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"made on a model in memory.*pass model="):
        MicrogliaPruningSystem.from_pretrained(tmp_path)


def test_every_part_of_the_pruner_is_saved(system, tmp_path):
    parts = {"gate": Gate(threshold=0.3, bucket=4, temperature=0.9), "window": 7, "fill": "mean", "units": ("head",)}
    system.pruner = Pruner(system.pruner.policy, **parts)
    system.save_pretrained(tmp_path)
    loaded = MicrogliaPruningSystem.from_pretrained(tmp_path)
    assert {name: getattr(loaded.pruner, name) for name in parts} == parts
    assert loaded.pruner.budget is None
