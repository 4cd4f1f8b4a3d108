"""`microglia calibrate`: a sentence, a table or JSON, and a checkpoint that remembers what was promised."""

import json

import pytest
from typer.testing import CliRunner

from microglia.checkpoint import Checkpoint
from microglia.cli.main import app
from microglia.record import read_records
from microglia.system import MicrogliaPruningSystem
from tests.tiny_folder import checkpoint_for, save_tiny_model

FEW = "--limit 3 --max-new-tokens 2 --batch-size 3".split()


@pytest.fixture
def folder(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    system = MicrogliaPruningSystem(model)
    system.pruner = checkpoint_for(system.model).pruner
    system.set_keep_ratio(None, prompts=["What is 1 plus 2?", "Tom eats 3 of 9 apples. How many are left?"])
    return system.save_pretrained(tmp_path / "saved")


def run(*arguments: object):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_a_keep_ratio_is_set_and_saved_with_its_limit(folder, tmp_path):
    done = run("--model_path", folder, "--keep_ratio", 0.6, *FEW, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert {"keep_ratio", "drop", "drop_bound", "confidence", "prompts"} <= data.keys()
    saved = Checkpoint.from_pretrained(folder)
    assert saved.config.threshold == data["threshold"] != 0
    assert saved.config.promise["sentence"] == data["sentence"]
    assert saved.pruner.budget.prompts == 2
    (record,) = read_records(folder / "calibration.jsonl")
    assert (record.name, record.n, record.extra["chosen"]) == ("accuracy_drop", 3, True)
    assert len((folder / "calibration-ledger.jsonl").read_text().splitlines()) == 2


def test_too_few_prompts_leave_the_model_dense(folder, tmp_path):
    before = Checkpoint.from_pretrained(folder).config
    done = run("--model-path", folder, "--output-dir", tmp_path / "calibrated", *FEW)
    assert done.exit_code == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "3 prompts are too few to promise a drop of at most 2 points" in words
    assert Checkpoint.from_pretrained(folder).config == before
    dense = MicrogliaPruningSystem.from_pretrained(tmp_path / "calibrated")
    dense.generate("What is 5 plus 6?", 2)
    assert dense.get_sparsity() == 0


def test_every_setting_that_was_tried_is_shown(folder):
    done = run("--model-path", folder, "--max-drop", 0.9, "--settings", "0.9,0.5", "--limit", 4, *FEW[2:])
    assert done.exit_code == 0, done.stderr
    assert "chosen" in done.stdout
    assert "with 95% confidence that costs at most 90 points" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("loss", "words"), [("agreement", "other tokens"), ("kl", "KL, nats per token")])
def test_a_promise_may_be_about_tokens(loss, words, folder):
    few = ["--dataset", "text", "--limit", 8, "--max-new-tokens", 3, "--settings", "0.9,0.5"]
    done = run("--model-path", folder, "--loss", loss, "--max-drop", 0.9, "--confidence", 0.5, *few)
    assert done.exit_code == 0, done.stderr
    assert words in done.stdout
    assert Checkpoint.from_pretrained(folder).config.promise["loss"] == loss
    record = read_records(folder / "calibration.jsonl")[0]
    assert (record.name, record.unit) == (f"{loss}_drop", "nats/token" if loss == "kl" else "ratio")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "no checkpoint was given; say --model-path FOLDER"),
        ("--model-path nowhere/at-all", "nowhere/at-all is no folder to save the result in; say --output-dir FOLDER"),
        ("--model-path SAVED --keep-ratio 0.5 --latency-ratio 1.1", "choose one of them"),
        ("--model-path SAVED --settings many", "--settings many was given; give numbers separated by commas"),
        ("--model-path SAVED --max-drop 2", "max_drop=2.0 was given; it must lie between 0 and 1"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, folder):
    done = run(*arguments.replace("SAVED", str(folder)).split(), "--json")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert sentence in done.stderr
