"""An ablation: which runs there are, that finished ones are not trained again, and what it says of them."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from microglia.agent import KEEP_AT_START
from microglia.cli.ablate import pairs
from microglia.cli.main import app
from microglia.errors import ConfigError
from microglia.evaluation.bench import Bench
from microglia.evaluation.significance import mcnemar_exact
from microglia.experiments.ablate import FACTORS, Recipe, Variant, summarise, variants
from microglia.policy import AgentPolicy
from microglia.record import read_records
from microglia.report import gather, page
from tests.tiny_folder import save_tiny_model

# --- which runs  -----------------------------------------------------------------------------------------------------


def test_one_thing_is_changed_at_a_time() -> None:
    base = Recipe()
    found = variants(base, {"beta": (0.0, 0.01), "features": ("both", "norm")})
    assert [v.name for v in found] == ["base", "beta 0.0", "features norm"]  # 0.01 and both are the base
    assert found[0].recipe == base
    assert found[1].recipe.config.beta == 0.0
    assert found[1].recipe.features == "both"


def test_a_grid_has_every_combination_once() -> None:
    found = variants(Recipe(), {"beta": (0.0, 0.01), "bucket": (None, 1)}, full_grid=True)
    assert [v.name for v in found] == ["base", "beta 0.0", "beta 0.0, bucket 1", "bucket 1"]
    assert len({v.recipe for v in found}) == 4


def test_a_bucket_that_is_the_usual_one_is_no_variant() -> None:
    found = variants(Recipe(), {"bucket": (None, 1, 4)}, usual_bucket=1)
    assert [v.name for v in found] == ["base", "bucket 4"]
    assert [v.name for v in variants(Recipe(bucket=1), {"bucket": (None, 2)}, usual_bucket=1)] == ["base", "bucket 2"]


def test_a_hidden_dim_that_is_the_usual_one_is_no_variant() -> None:
    assert [v.name for v in variants(Recipe(), {"hidden_dim": (4, 16, 128)})] == [
        "base",
        "hidden_dim 4",
        "hidden_dim 128",
    ]
    mlp = variants(Recipe(policy="agents"), {"hidden_dim": (4, 16, 128)})
    assert [v.name for v in mlp] == ["base", "hidden_dim 4", "hidden_dim 16"]


def test_alpha_takes_the_place_of_a_keep_ratio() -> None:
    steered = Recipe().changed("keep_ratio", 0.6)
    found = variants(steered, {"alpha": (0.3,), "beta": (0.1,)})
    assert [v.name for v in found] == ["base", "alpha 0.3", "beta 0.1"]
    assert [v.recipe.config.keep_ratio for v in found] == [0.6, None, 0.6]


def test_every_default_factor_can_be_changed() -> None:
    found = variants(Recipe(), FACTORS)
    assert len(found) == 1 + sum(len(values) - 1 for values in FACTORS.values())
    by_name = {v.name: v.recipe for v in found}
    assert by_name["alpha 1.0"].config.alpha == (0.01, 1.0)
    assert by_name["temperature 0.5"].config.temperature == (0.5, 0.5)
    assert by_name["hidden_dim 4"].hidden_dim == 4
    assert by_name["policy agents"].policy == "agents"
    assert by_name["lora joint"].config.lora == "joint"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("gamma", 1, "a recipe has no gamma; choose from policy, hidden_dim, features, bucket"),
        ("beta", "much", "beta='much' was given; it must be a number"),
        ("fill", 0, "fill=0 was given; it must be a word"),
        ("policy", "gru", "policy='gru' is unknown; choose agents or mixture"),
        ("lora", "later", "lora='later' is unknown; choose one of"),
    ],
)
def test_what_no_recipe_has_is_refused(name, value, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Recipe().changed(name, value)


def test_values_are_read_as_they_are_meant() -> None:
    assert pairs("--vary", ["beta=0,0.1", "hidden-dim=32", "lora=none,first", "bucket=default,1"]) == {
        "beta": [0, 0.1],
        "hidden_dim": [32],
        "lora": ["none", "first"],
        "bucket": [None, 1],
    }
    with pytest.raises(ConfigError, match="--vary beta was given; write NAME=VALUE"):
        pairs("--vary", ["beta"])


# --- what is said of them --------------------------------------------------------------------------------------------


def judged(correct, kept: float) -> dict:
    answer = {"text": "", "new_tokens": 5, "difficulty": 1, "family": "", "keep_ratio": kept}
    answers = [{"id": str(i), "correct": bool(c), **answer} for i, c in enumerate(correct)]
    return {"answers": answers, "seconds": 1.0, "losses": [1 - c / 2 for c in correct]}


def test_differences_are_paired_with_the_base_at_one_keep_ratio() -> None:
    base, better = [1] * 20 + [0] * 20, [1] * 30 + [0] * 10
    rest = {"as_trained": judged(base, 0.875), "seconds": 2.0, "agent_parameters": 7}
    runs = [[{"at": judged(x, 0.75), **rest}] for x in (base, better)]
    wanted = [Variant(Recipe()), Variant(Recipe().changed("beta", 0.0), {"beta": 0.0})]
    found = summarise(wanted, runs, [0], 0.75)
    first, second = found.rows
    assert first.to_base is None
    assert (second.variant, second.to_base.diff, second.loss_to_base.diff) == ("beta 0.0", 0.25, -0.125)
    assert second.to_base.p_value == second.to_base.p_holm == mcnemar_exact(better, base)
    assert second.to_base.ci95[0] > 0
    assert (second.keep_ratio, second.as_trained.keep_ratio, second.as_trained.accuracy) == (0.75, 0.875, 0.5)
    assert (found.at_keep_ratio, found.prompts) == (0.75, 40)


# --- a whole one -----------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("microglia.cli.ablate.HELD_OUT", 4)
    model = save_tiny_model(tmp_path / "model")
    recipe = "--set baseline-steps=3 --set max-steps=2 --set limit=4 --set batch-size=2 --set eval-limit=2"
    recipe += " --set hidden-dim=8"
    rest = "--vary lora=joint --vary fill=mean --limit 3 --max-new-tokens 2 --json"
    command = ["ablate", "--model", str(model), "--output-dir", str(tmp_path / "out"), *recipe.split(), *rest.split()]
    trained = []

    def counted(*args, **options):
        trained.append(args[4].lora)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    import microglia.experiments.ablate as module

    real, baselines, starts = module.train, [], []
    real_baseline, real_start = module.train_static_baseline, AgentPolicy.start_from

    def counted_baseline(*args, **options):
        baselines.append(args[3].max_steps)
        return real_baseline(*args, **options)

    def watched_start(policy, logits, **options):
        starts.append(torch.stack(list(logits)))
        return real_start(policy, logits, **options)

    monkeypatch.setattr(module, "train_static_baseline", counted_baseline)
    monkeypatch.setattr(AgentPolicy, "start_from", watched_start)
    monkeypatch.setattr(module, "train", counted)
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
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 3  # of this ablation, however often it is told


def test_its_own_keep_ratio_may_be_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("microglia.cli.ablate.HELD_OUT", 4)
    recipe = "--set baseline-steps=0 --set max-steps=1 --set limit=4 --set batch-size=2 --set eval-limit=2"
    rest = "--vary features=norm --limit 3 --max-new-tokens 2 --no-own --answer-room 1.25"
    model = save_tiny_model(tmp_path / "model")
    command = ["ablate", "--model", str(model), "--output-dir", str(tmp_path / "out"), *recipe.split(), *rest.split()]
    runs, real = [], Bench.answers
    monkeypatch.setattr(Bench, "answers", lambda *given: runs.append(given[2]) or real(*given))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "Trained:" not in done.stdout
    assert all(word in done.stdout for word in ("features", "norm", "to base"))
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(runs) == 2  # one per run
    data = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert "as_trained" not in data["rows"][0]
    record = read_records(tmp_path / "out" / "records.jsonl")[0]
    assert record.extra["answer_room"] == 1.25
    assert "features norm" in page(gather([tmp_path / "out"]))


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
