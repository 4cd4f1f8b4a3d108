"""An ablation: which runs there are, what it says of them, and that none is trained twice."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from microglia.cli.ablate import pairs
from microglia.cli.main import app
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.evaluation.significance import mcnemar_exact
from microglia.experiments import ablate
from microglia.experiments.ablate import FACTORS, Recipe, Variant, summarise, variants
from microglia.policies import LearnedPolicy
from microglia.policies.agents import KEEP_AT_START
from microglia.record import read_records
from microglia.report import gather, page
from tests.tiny_folder import save_tiny_model

# --- which runs there are ---


def test_one_thing_is_changed_at_a_time() -> None:
    base = Recipe()
    # 0.01 and both are the base
    wanted = variants(base, {"beta": (0.0, 0.01), "signals": ("both", "norm")})
    assert [v.name for v in wanted] == ["base", "beta 0.0", "signals norm"]
    assert wanted[0].recipe == base
    assert wanted[1].recipe.config.beta == 0.0
    assert wanted[1].recipe.signals == "norm+entropy"


def test_a_grid_has_every_combination_once() -> None:
    wanted = variants(Recipe(), {"beta": (0.0, 0.01), "bucket": (None, 1)}, full_grid=True)
    assert [v.name for v in wanted] == ["base", "beta 0.0", "beta 0.0, bucket 1", "bucket 1"]
    assert len({v.recipe for v in wanted}) == 4


def test_a_bucket_that_is_the_usual_one_is_no_variant() -> None:
    default = variants(Recipe(), {"bucket": (None, 1, 4)}, usual_bucket=1)
    assert [v.name for v in default] == ["base", "bucket 4"]
    same = variants(Recipe(bucket=1), {"bucket": (None, 2)}, usual_bucket=1)
    assert [v.name for v in same] == ["base", "bucket 2"]


def test_a_hidden_dim_that_is_the_usual_one_is_no_variant() -> None:
    mixture = variants(Recipe(), {"hidden_dim": (4, 16, 128)})
    assert [v.name for v in mixture] == ["base", "hidden_dim 4", "hidden_dim 128"]
    mlp = variants(Recipe(policy="agents"), {"hidden_dim": (4, 16, 128)})
    assert [v.name for v in mlp] == ["base", "hidden_dim 4", "hidden_dim 16"]


def test_alpha_takes_the_place_of_a_keep_ratio() -> None:
    steered = Recipe().changed("keep_ratio", 0.6)
    wanted = variants(steered, {"alpha": (0.3,), "beta": (0.1,)})
    assert [v.name for v in wanted] == ["base", "alpha 0.3", "beta 0.1"]
    assert [v.recipe.config.keep_ratio for v in wanted] == [0.6, None, 0.6]


def test_every_default_factor_can_be_changed() -> None:
    wanted = variants(Recipe(), FACTORS)
    assert len(wanted) == 1 + sum(len(values) - 1 for values in FACTORS.values())
    by_name = {v.name: v.recipe for v in wanted}
    assert by_name["alpha 1.0"].config.alpha == (0.01, 1.0)
    assert by_name["temperature 0.5"].config.temperature == (0.5, 0.5)
    assert by_name["hidden_dim 4"].hidden_dim == 4
    assert by_name["policy agents"].policy == "agents"
    assert by_name["lora joint"].config.lora == "joint"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "gamma",
            1,
            "a recipe has no gamma; choose from policy, hidden_dim, signals, fill, bucket",
        ),
        ("beta", "much", "beta='much' was given; it must be a number"),
        ("fill", 0, "fill=0 was given; it must be a word"),
        ("policy", "gru", "policy='gru' is unknown; choose agents, mixture, codebook or layers"),
        ("lora", "later", "lora='later' is unknown; choose one of"),
    ],
)
def test_what_no_recipe_has_is_refused(name, value, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Recipe().changed(name, value)


def test_values_are_read_as_they_are_meant() -> None:
    words = ["beta=0,0.1", "hidden-dim=32", "lora=none,first", "bucket=default,1"]
    assert pairs("--vary", words) == {
        "beta": [0, 0.1],
        "hidden_dim": [32],
        "lora": ["none", "first"],
        "bucket": [None, 1],
    }
    with pytest.raises(ConfigError, match="--vary beta was given; write NAME=VALUE"):
        pairs("--vary", ["beta"])


# --- what is said of them ---


def judged(correct, kept: float) -> dict:
    answer = {"text": "", "new_tokens": 5, "difficulty": 1, "family": "", "keep_ratio": kept}
    answers = [{"id": str(i), "correct": bool(c), **answer} for i, c in enumerate(correct)]
    return {"answers": answers, "seconds": 1.0, "losses": [1 - c / 2 for c in correct]}


def test_differences_are_paired_with_the_base_at_one_keep_ratio() -> None:
    base, better = [1] * 20 + [0] * 20, [1] * 30 + [0] * 10
    rest = {"as_trained": judged(base, 0.875), "seconds": 2.0, "agent_parameters": 7}
    runs = [[{"at": judged(x, 0.75), **rest}] for x in (base, better)]
    wanted = [Variant(Recipe()), Variant(Recipe().changed("beta", 0.0), {"beta": 0.0})]
    result = summarise(wanted, runs, [0], 0.75)
    first, second = result.rows
    assert first.to_base is None
    assert second.variant == "beta 0.0"
    assert (second.to_base.diff, second.loss_to_base.diff) == (0.25, -0.125)
    assert second.to_base.p_value == second.to_base.p_holm == mcnemar_exact(better, base)
    assert second.to_base.ci95[0] > 0
    assert second.keep_ratio == 0.75
    assert (second.as_trained.keep_ratio, second.as_trained.accuracy) == (0.875, 0.5)
    assert (result.at_keep_ratio, result.prompts) == (0.75, 40)


# --- a whole ablation ---


SHORT = "--set max-steps=2 --set limit=4 --set batch-size=2 --set eval-limit=2".split()
FEW = "--limit 3 --max-new-tokens 2".split()


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """An ablation of a tiny model with short trainings on few prompts."""
    monkeypatch.setattr("microglia.cli.ablate.HELD_OUT", 4)
    model = str(save_tiny_model(tmp_path / "model"))
    return ["ablate", "--model", model, "--output-dir", str(tmp_path / "out"), *SHORT, *FEW]


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch, command) -> None:
    changes = "--set baseline-steps=3 --set hidden-dim=8 --vary lora=joint --vary fill=mean"
    command += [*changes.split(), "--json"]
    trained, baselines, starts = [], [], []
    real, real_baseline, real_start = ablate.train, ablate.train_in_memory, LearnedPolicy.start_from

    def counted(*args, **options):
        trained.append(args[4].lora)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    def counted_baseline(*args, **options):
        baselines.append(args[4].max_steps)
        return real_baseline(*args, **options)

    def recorded_start(policy, logits, **options):
        starts.append(torch.stack(list(logits)))
        return real_start(policy, logits, **options)

    monkeypatch.setattr(ablate, "train_in_memory", counted_baseline)
    monkeypatch.setattr(LearnedPolicy, "start_from", recorded_start)
    monkeypatch.setattr(ablate, "train", counted)
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130
    assert "keeps the finished runs: go on with the same command" in stopped.stderr
    assert trained == ["none", "joint", "none"]

    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert len(trained) == 4  # only the one that was missing
    assert baselines == [3]  # one for all variants of a seed, also after the interruption
    assert len(starts) == 4
    assert all(start.equal(starts[0]) for start in starts)
    assert not starts[0].equal(torch.full_like(starts[0], KEEP_AT_START))  # it was trained
    data = json.loads(done.stdout)
    assert [row["variant"] for row in data["rows"]] == ["base", "lora joint", "fill mean"]
    assert all(np.isfinite(row["loss"]) for row in data["rows"])
    assert data["base"]["hidden_dim"] == 8
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == data
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 3
    assert list((tmp_path / "out" / "runs").iterdir()) == []

    table = CliRunner().invoke(app, [word for word in command if word != "--json"])
    assert "fill mean" in table.stdout
    assert "with 75% of the heads kept" in " ".join(table.stdout.split())
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert len(trained) == 4
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 3  # however often it is shown


def test_a_file_that_was_edited_is_trained_and_judged_anew(tmp_path, monkeypatch, command) -> None:
    trained, real, file = [], ablate.train, tmp_path / "mine.jsonl"
    monkeypatch.setattr(ablate, "train", lambda *given, **options: trained.append(1) or real(*given, **options))

    def trainings(times: int) -> int:
        lines = [json.dumps({"question": f"{n} times {times}?", "answer": f"{n * times}"}) for n in range(1, 30)]
        file.write_text("\n".join(lines))
        before = len(trained)
        what = f"--dataset jsonl --data-dir {file} --set baseline-steps=0 --vary beta=0.01"
        done = CliRunner().invoke(app, [*command, *what.split()])
        assert done.exit_code == 0, done.stderr
        return len(trained) - before

    assert [trainings(times) for times in (2, 2, 3, 2)] == [1, 0, 1, 0]


def test_the_keep_ratio_of_the_training_may_be_left_out(tmp_path, monkeypatch, command) -> None:
    changes = "--set baseline-steps=0 --set max-steps=1 --vary signals=norm --no-own"
    runs, real = [], Setup.answers
    monkeypatch.setattr(Setup, "answers", lambda *given: runs.append(given[1]) or real(*given))
    done = CliRunner().invoke(app, [*command, *changes.split(), "--answer-limit", "1.25"])
    assert done.exit_code == 0, done.stderr
    assert "Trained:" not in done.stdout
    assert all(word in done.stdout for word in ("signals", "norm", "to base"))
    assert max(map(len, done.stdout.splitlines())) <= 80
    signals = [pruner.policy.signals for pruner in runs]
    assert signals == [("norm", "entropy"), ("norm",)]  # one per run
    data = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert "as_trained" not in data["rows"][0]
    record = read_records(tmp_path / "out" / "records.jsonl")[0]
    assert record.extra["answer_limit"] == 1.25
    assert "signals norm" in page(gather([tmp_path / "out"]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--vary gamma=1", "a recipe has no gamma"),
        ("--vary beta", "--vary beta was given; write NAME=VALUE"),
        ("--keep-ratio 1.5 --limit 2", "keep_ratio=1.5 was given"),
        ("--seeds 0,0 --limit 2", "seeds=[0, 0] was given"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, tmp_path) -> None:
    model = save_tiny_model(tmp_path / "model")
    place = ["--model", str(model), "--output-dir", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["ablate", *place, *arguments.split(), "--json"])
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr
