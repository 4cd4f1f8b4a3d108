"""A whole comparison on a tiny model: the same prompts for all, seeds, going on from a ledger, table and picture."""

import json

import pytest
import torch
from typer.testing import CliRunner

from microglia.attach import gated
from microglia.cli.main import app
from microglia.evaluation.bench import Bench
from microglia.experiments.compare.entries import config_of, parsed
from microglia.experiments.compare.summary import DENSE
from microglia.experiments.side_by_side import PairRecipe
from microglia.record import read_records
from microglia.sites import find_sites
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import TrainingConfig
from microglia.training.held_out import answer_losses
from microglia.training.static_baseline import baseline_config
from tests.experiments.compare.stub import stub_criterion
from tests.tiny_folder import checkpoint_for, save_tiny_model

FEW = "--limit 6 --max-new-tokens 2 --batch-size 4 --num-runs 0".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    system = MicrogliaPruningSystem(save_tiny_model(place / "model"))
    system.policy = checkpoint_for(system.model).policy
    return system.save_pretrained(place / "saved")


@pytest.fixture
def made(monkeypatch):
    """What was asked of the criteria."""
    asked: list = []
    monkeypatch.setattr("microglia.experiments.compare.entries.get_criterion", stub_criterion(asked))
    monkeypatch.setattr("microglia.cli.compare.HELD_OUT", 6)
    return asked


def run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_everything_on_the_same_prompts_and_again_from_the_ledger(folder, made, tmp_path) -> None:
    place = ["--model-path", folder, "--output-dir", tmp_path, "--seeds", "0,1", "--keep-ratios", "0.7"]
    command = [*place, "--at-keep-ratio", 0.5, "--policies", "random,norm:per-input", *FEW]
    done = run(*command, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [(row["policy"], row["target"]) for row in data["rows"]] == [
        (DENSE, 1.0),
        *((name, ratio) for name in ("agents", "static_baseline", "random", "norm:per-input") for ratio in (0.7, 0.5)),
    ]
    assert data["adaptivity"]["target"] == 0.5
    assert [row["seeds"] for row in data["rows"][:4]] == [[0], [0], [0], [0, 1]]
    assert sorted({(kind, seed, per_input) for kind, seed, _, per_input, _ in made}) == [
        ("norm", 0, True),
        ("norm", 1, True),
        ("random", 0, False),
        ("random", 1, False),
        ("static_baseline", 0, False),
        ("static_baseline", 1, False),
    ]
    assert all(row["keep_ratio"] >= 0.4 for row in data["rows"])
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == data["rows"]
    names = [record.name for record in read_records(tmp_path / "records.jsonl")]
    assert (names.count("accuracy"), names.count("adaptivity")) == (9, 1)

    made.clear()
    again = json.loads(run(*command, "--json").stdout)
    assert again["rows"] == data["rows"]
    assert made == []  # nothing was trained or answered again

    table = run(*command)
    assert "Adapting to the input adds" in table.stdout
    assert "norm:per-input" in table.stdout


def test_time_and_memory_are_measured_and_drawn(folder, made, tmp_path) -> None:
    flags = "--keep-ratios 0.5 --at-keep-ratio 0.5 --limit 2 --max-new-tokens 2 --num-runs 1".split()
    picture = tmp_path / "front.png"
    done = run("--model-path", folder, *flags, "--plot", picture, "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    dense = rows[0]
    assert all(row["latency"]["ms_per_token"] > 0 for row in rows)
    assert all(row["latency"]["kv_bytes"] < dense["latency"]["kv_bytes"] for row in rows[1:])
    assert all("pareto_latency" in row for row in rows)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_static_baseline_may_be_a_checkpoint(folder, made) -> None:
    done = run("--model-path", folder, "--policies", f"static_baseline={folder}", *FEW, "--keep-ratios", 0.6, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert {row["policy"] for row in data["rows"]} == {DENSE, "agents", "static_baseline"}
    assert data["adaptivity"]["gain"] == data["adaptivity"]["loss"]["diff"] == 0  # it is the same policy
    assert made == []


def keys(place) -> list[dict]:
    return [json.loads(line)["key"] for line in (place / "ledger.jsonl").read_text().splitlines() if line]


def test_a_name_given_again_is_the_next_seed_and_seeds_may_be_done_apart(folder, made, tmp_path) -> None:
    system = MicrogliaPruningSystem.from_pretrained(folder)
    system.policy = checkpoint_for(system.model, seed=5).policy
    other = system.save_pretrained(tmp_path / "other")
    flags = [*FEW, "--keep-ratios", 0.6, "--at-keep-ratio", 0.6, "--output-dir", tmp_path / "out", "--json"]
    for seed, agents, baseline in ((0, folder, other), (1, other, folder)):  # as two processes would
        part = run("--model-path", agents, "--policies", f"static_baseline={baseline}", "--seeds", seed, *flags)
        assert part.exit_code == 0, part.stderr
    before = keys(tmp_path / "out")
    baselines = f"static_baseline={other},static_baseline={folder}"
    done = run("--model-path", f"{folder},{other}", "--policies", baselines, "--seeds", "0,1", *flags)
    assert done.exit_code == 0, done.stderr
    assert keys(tmp_path / "out") == before  # nothing was answered again
    data = json.loads(done.stdout)
    assert [row["seeds"] for row in data["rows"]] == [[0], [0, 1], [0, 1]]
    assert data["adaptivity"]["gain"] == pytest.approx(0)  # each is the other's baseline
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 4  # of this comparison, not of the parts


def test_a_score_that_no_seed_changes_is_measured_once(folder, made, tmp_path, monkeypatch) -> None:
    asked = []
    real = Bench.answers
    monkeypatch.setattr(Bench, "answers", lambda *given: asked.append(given[1]) or real(*given))
    flags = [*FEW, "--keep-ratios", 0.6, "--at-keep-ratio", 0.6, "--seeds", "0,1,2", "--json"]
    done = run("--model-path", folder, "--policies", f"static_baseline={folder},norm:per-input,random", *flags)
    assert done.exit_code == 0, done.stderr
    assert len(asked) == 1 + 1 + 1 + 1 + 3  # dense, agents, static baseline, norm, and random for every seed
    norm = json.loads(done.stdout)["rows"][3]
    assert (norm["policy"], norm["seeds"]) == ("norm:per-input", [0, 1, 2])


def test_pairs_are_trained_once_per_seed(folder, made, tmp_path, monkeypatch) -> None:
    short = TrainingConfig(max_steps=1, limit=4, batch_size=2, eval_limit=2, keep_ratio=0.6)
    monkeypatch.setattr("microglia.experiments.demo.RECIPE", PairRecipe(short, short))
    model = folder.parent / "model"
    flags = [*FEW, "--keep-ratios", 0.6, "--at-keep-ratio", 0.6, "--seeds", "0,1", "--json", "--answer-room", 1.25]
    command = ["--train-pairs", "--model", model, "--output-dir", tmp_path, *flags]
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [(row["policy"], row["seeds"]) for row in data["rows"]][:3] == [
        ("dense", [0]),
        ("agents", [0, 1]),
        ("static_baseline", [0, 1]),
    ]
    assert data["settings"]["answer_room"] == 1.25
    assert {place.name for place in (tmp_path / "pairs").iterdir()} == {"0", "1"}
    assert all(seed == 0 for kind, seed, *_ in made if kind == "static_baseline")  # none was trained as a criterion
    before = keys(tmp_path)
    monkeypatch.setattr("microglia.training.static_baseline.train", None)
    assert json.loads(run(*command).stdout)["rows"] == data["rows"]
    assert keys(tmp_path) == before


def test_names_are_put_in_order_and_the_static_baseline_is_always_there() -> None:
    assert list(parsed(["random,norm", "random"])) == ["agents", "static_baseline", "random", "norm"]
    names = parsed(["norm", "static_baseline=runs/a,static_baseline=runs/b"])
    assert names == {"agents": [], "static_baseline": ["runs/a", "runs/b"], "norm": []}


def test_the_static_baseline_is_trained_as_the_agents_were() -> None:
    told = {"max_steps": 40, "alpha": [0.02, 0.2], "lora": "joint", "learning_rate": 3e-3, "gone_option": 1}
    recipe = baseline_config(config_of(told))
    assert (recipe.max_steps, recipe.alpha, recipe.lora) == (40, (0.02, 0.2), "none")
    assert recipe.learning_rate > TrainingConfig().learning_rate


def test_losses_are_those_of_the_answers_under_hard_gates(folder) -> None:
    system = MicrogliaPruningSystem.from_pretrained(folder)
    task = get_task("arithmetic")
    bench = Bench(system.model, system.tokenizer, task, task.load("test", limit=5))
    options = {"template": task.template, "gate": system.gate, "look": system.look}

    def losses(policy, **more):
        return answer_losses(bench.model, bench.tokenizer, bench.examples, policy, **{**options, **more})

    assert losses(system.policy, batch_size=2) == pytest.approx(losses(system.policy, batch_size=5), abs=1e-4)
    dense = losses(None)
    assert max(abs(a - b) for a, b in zip(losses(system.policy), dense, strict=True)) > 1e-3
    example = bench.examples[0]  # the same by hand: one pass, no padding, no cache
    prompt = system.tokenizer(task.template.format(question=example.question))["input_ids"]
    answer = [*system.tokenizer(" " + example.answer)["input_ids"], system.tokenizer.eos_token_id]
    sites = find_sites(system.model)
    keep = [system.gate(x[:1], site.geometry) for x, site in zip(bench.logits(system.policy), sites, strict=True)]
    where = torch.tensor([[False] * len(prompt) + [True] * len(answer)])

    def by_hand() -> float:
        logits = system.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))

    with torch.no_grad():
        assert dense[0] == pytest.approx(by_hand(), abs=1e-4)
        with gated(sites, keep, where=where):
            pruned = by_hand()
    assert losses(system.policy)[0] == pytest.approx(pruned, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "no checkpoint was given"),
        ("--model-path SAVED --policies shap", "there is no criterion 'shap'; choose one of"),
        ("--model-path SAVED --policies mask=nowhere", "give name=FOLDER with a checkpoint folder"),
        ("--model-path SAVED --keep-ratios 1.5", "keep_ratios=[1.5"),
        ("--model-path SAVED --seeds 0,0", "seeds=[0, 0] was given; give at least one and none twice"),
        ("--model-path SAVED,SAVED --seeds 0,1,2", "agents has 2 policies but 3 seeds were given"),
        ("--train-pairs", "--train-pairs trains agents instead of loading them"),
        ("--model-path SAVED --answer-room 0.5", "answer_room=0.5 was given; it must be 1 or more"),
        ("--model-path SAVED --plot x.bmp", "x.bmp was given for the plot; it must end in .png"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, folder, made) -> None:
    done = run(*arguments.replace("SAVED", str(folder)).split(), *FEW, "--json")
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr
