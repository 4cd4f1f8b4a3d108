"""`microglia export`: from a trained checkpoint to a smaller model, with its record and its sentences."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from microglia.checkpoint import Checkpoint
from microglia.cli.main import app
from microglia.models import load_model
from microglia.system import MicrogliaPruningSystem
from tests.tiny_folder import opinionated, save_tiny_model


def run(*arguments: object):
    return CliRunner().invoke(app, ["export", *[str(a) for a in arguments]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of agents that decide differently for every prompt, with calibration logits."""
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path_factory.mktemp("tiny")), hidden_dim=16)
    opinionated(system.pruner.policy, seed=2)
    system.set_keep_ratio(0.7, [f"{i} + {3 * i} =" for i in range(6)])
    return system.save_pretrained(tmp_path_factory.mktemp("checkpoint"))


def test_the_mean_plan_is_written_evaluated_and_recorded(checkpoint, tmp_path):
    place = tmp_path / "exported"
    flags = "--plan mean --keep-ratio 0.6 --evaluate 2 --max-new-tokens 3 --json".split()
    result = run(checkpoint, "--output-dir", place, *flags)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["plan"] == "mean"
    assert data["prompts"] == 6
    assert 0.5 < data["keep_ratio"] < 0.8
    assert data["difference"] == 0.0
    assert data["parameters"] < data["dense_parameters"]
    assert data["accuracy"]["frozen"]["sparsity"] == pytest.approx(data["sparsity"])
    assert "ci95" in data["accuracy"]["paired"]
    assert "no keep ratio can be set" in data["lost"][0]
    record = json.loads((place / "microglia_export.json").read_text())
    assert record["heads"] == data["heads"]
    again = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    assert sum(p.numel() for p in again.parameters()) == data["parameters"]


def test_the_prompt_plan_is_what_the_checkpoint_decides_for_it(checkpoint, tmp_path):
    question = "What is 7 plus 5?"
    result = run(checkpoint, "--plan", "prompt", "--prompt", question, "--output-dir", tmp_path / "x", "--json")
    assert result.exit_code == 0, result.stderr
    system = MicrogliaPruningSystem.from_pretrained(checkpoint)
    system.generate(question, 1)
    assert json.loads(result.stdout)["sparsity"] == pytest.approx(system.get_sparsity())


def test_the_task_plan_reads_its_prompts_and_shows_a_table(checkpoint, tmp_path):
    flags = "--plan task --dataset arithmetic --limit 3 --no-check --evaluate 1 --max-new-tokens 2".split()
    result = run(checkpoint, "--output-dir", tmp_path / "x", *flags)
    assert result.exit_code == 0, result.stderr
    assert "by plan task over 3 prompts" in " ".join(result.stdout.split())
    assert "not compared" in result.stdout
    assert "frozen minus dense" in result.stdout
    load_model(tmp_path / "x", trust_remote_code=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("CHECKPOINT --format zip", "'--format': 'zip' is not one of 'hf', 'onnx', 'gguf'"),
        ("CHECKPOINT --plan best", "'--plan': 'best' is not one of 'mean', 'task', 'prompt'"),
        ("CHECKPOINT --plan prompt", "plan='prompt' was given no prompt"),
        ("CHECKPOINT --prompt hello", "plan='mean' was given a prompt"),
        ("CHECKPOINT --output-dir CHECKPOINT", "not an earlier export, and would be mixed with it"),
        ("--output-dir NEW", "no checkpoint was given"),
        ("UNTRAINED --output-dir NEW", "the plan 'mean' needs prompts"),
        ("MEANFILL --output-dir NEW", "fills pruned heads with their mean over each prompt"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, checkpoint, tmp_path):
    saved = Checkpoint.from_pretrained(checkpoint)
    places = {"CHECKPOINT": checkpoint, "NEW": tmp_path / "new"}
    if "UNTRAINED" in arguments:
        places["UNTRAINED"] = Checkpoint(replace(saved.pruner, budget=None), saved.config).save_pretrained(
            tmp_path / "untrained"
        )
    if "MEANFILL" in arguments:
        system = MicrogliaPruningSystem.from_pretrained(checkpoint)
        system.pruner = replace(system.pruner, fill="mean")
        places["MEANFILL"] = system.save_pretrained(tmp_path / "meanfill")
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("microglia: ")
    assert sentence in result.stderr
