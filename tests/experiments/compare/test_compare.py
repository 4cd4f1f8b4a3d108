"""A whole comparison on a tiny model: same prompts for all, seeds, ledger, table and picture."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from microglia.cli.main import app
from microglia.evaluation.setup import Setup
from microglia.execution import Decision, Masked
from microglia.experiments.compare import Comparison, make_entries
from microglia.experiments.compare.entries import baseline_of, config_of, parsed
from microglia.experiments.compare.summary import DENSE
from microglia.experiments.side_by_side import PairRecipe
from microglia.record import read_records
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config
from microglia.units import find_sites
from tests.experiments.compare.stub import stub_criterion
from tests.tiny_folder import opinionated_pruner, save_tiny_model

FEW = "--limit 6 --max-new-tokens 2 --batch-size 4 --num-runs 0".split()
AT = "--keep-ratios 0.6 --at-keep-ratio 0.6".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    system = MicrogliaPruningSystem(save_tiny_model(place / "model"))
    system.pruner = opinionated_pruner(system.model)
    return system.save_pretrained(place / "saved")


@pytest.fixture
def made(monkeypatch):
    """Every policy that a criterion made."""
    policies: list = []
    criterion = stub_criterion(policies)
    monkeypatch.setattr("microglia.experiments.compare.entries.get_criterion", criterion)
    monkeypatch.setattr("microglia.cli.compare.HELD_OUT", 6)
    return policies


def run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_everything_on_the_same_prompts_and_again_from_the_ledger(folder, made, tmp_path) -> None:
    place = ["--model-path", folder, "--output-dir", tmp_path, "--seeds", "0,1"]
    ratios = ["--keep-ratios", "0.7", "--at-keep-ratio", 0.5]
    command = [*place, *ratios, "--policies", "random,norm:per-input", *FEW]
    done = run(*command, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    names = ("agents", "static_baseline", "random", "norm:per-input")
    targets = [(DENSE, 1.0), *((name, ratio) for name in names for ratio in (0.7, 0.5))]
    assert [(row["policy"], row["target"]) for row in data["rows"]] == targets
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
    few = "--limit 2 --max-new-tokens 2 --num-runs 1".split()
    flags = ["--keep-ratios", 0.5, "--at-keep-ratio", 0.5, *few]
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
    flags = [*FEW, "--keep-ratios", 0.6, "--json"]
    done = run("--model-path", folder, "--policies", f"static_baseline={folder}", *flags)
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert {row["policy"] for row in data["rows"]} == {DENSE, "agents", "static_baseline"}
    gain = data["adaptivity"]
    assert gain["gain"] == gain["loss"]["diff"] == 0  # it is the same policy
    assert made == []


def keys(place) -> list[dict]:
    lines = (place / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["key"] for line in lines if line]


def test_a_name_given_again_is_the_next_seed_and_seeds_may_be_apart(folder, made, tmp_path) -> None:
    system = MicrogliaPruningSystem.from_pretrained(folder)
    system.pruner = opinionated_pruner(system.model, seed=5)
    other = system.save_pretrained(tmp_path / "other")
    flags = [*FEW, *AT, "--output-dir", tmp_path / "out", "--json"]
    # as two processes would
    for seed, agents, baseline in ((0, folder, other), (1, other, folder)):
        pair = ["--model-path", agents, "--policies", f"static_baseline={baseline}"]
        part = run(*pair, "--seeds", seed, *flags)
        assert part.exit_code == 0, part.stderr
    before = keys(tmp_path / "out")
    baselines = f"static_baseline={other},static_baseline={folder}"
    agents = f"{folder},{other}"
    done = run("--model-path", agents, "--policies", baselines, "--seeds", "0,1", *flags)
    assert done.exit_code == 0, done.stderr
    assert keys(tmp_path / "out") == before  # nothing was answered again
    data = json.loads(done.stdout)
    assert [row["seeds"] for row in data["rows"]] == [[0], [0, 1], [0, 1]]
    assert data["adaptivity"]["gain"] == pytest.approx(0)  # each is the other's baseline
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert len(records) == 4  # of this comparison, not of the parts


def test_a_score_that_no_seed_changes_is_measured_once(folder, made, monkeypatch) -> None:
    answered, real = [], Setup.answers
    monkeypatch.setattr(Setup, "answers", lambda *given: answered.append(given[1]) or real(*given))
    policies = f"static_baseline={folder},norm:per-input,random"
    flags = [*FEW, *AT, "--seeds", "0,1,2", "--json"]
    done = run("--model-path", folder, "--policies", policies, *flags)
    assert done.exit_code == 0, done.stderr
    # dense, agents, static baseline, norm, and random for every seed
    assert len(answered) == 1 + 1 + 1 + 1 + 3
    norm = json.loads(done.stdout)["rows"][3]
    assert (norm["policy"], norm["seeds"]) == ("norm:per-input", [0, 1, 2])


def test_answers_are_of_the_data_and_not_of_its_name(folder, made, tmp_path) -> None:
    """A file that was edited is answered anew: the dense model, and every policy on it."""
    file = tmp_path / "mine.jsonl"

    def answered(times: int) -> int:
        lines = [json.dumps({"question": f"{n} times {times}?", "answer": f"{n * times}"}) for n in range(1, 30)]
        file.write_text("\n".join(lines))
        before = len(keys(tmp_path / "out")) if (tmp_path / "out").exists() else 0
        place = ["--dataset", "jsonl", "--data-dir", file, "--output-dir", tmp_path / "out", "--policies", "random"]
        done = run("--model-path", folder, *place, *FEW, *AT, "--json")
        assert done.exit_code == 0, done.stderr
        return len(keys(tmp_path / "out")) - before

    assert [answered(times) for times in (2, 2, 3, 2)] == [4, 0, 4, 0]


def test_pairs_are_trained_once_per_seed(folder, made, tmp_path, monkeypatch) -> None:
    short = TrainingConfig(max_steps=1, limit=4, batch_size=2, eval_limit=2, keep_ratio=0.6)
    monkeypatch.setattr("microglia.experiments.demo.RECIPE", PairRecipe(short, short))
    model = folder.parent / "model"
    flags = [*FEW, *AT, "--seeds", "0,1", "--json", "--answer-limit", 1.25]
    command = ["--train-pairs", "--model", model, "--output-dir", tmp_path, *flags]
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [(row["policy"], row["seeds"]) for row in data["rows"]][:3] == [
        ("dense", [0]),
        ("agents", [0, 1]),
        ("static_baseline", [0, 1]),
    ]
    assert data["settings"]["answer_limit"] == 1.25
    assert {place.name for place in (tmp_path / "pairs").iterdir()} == {"0", "1"}
    assert "static_baseline" not in [kind for kind, *_ in made]  # none was trained as a criterion
    before = keys(tmp_path)
    monkeypatch.setattr("microglia.training.static_baseline.train", None)
    assert json.loads(run(*command).stdout)["rows"] == data["rows"]
    assert keys(tmp_path) == before


def test_names_are_put_in_order_and_the_static_baseline_is_always_there() -> None:
    names = parsed(["random,norm", "random"])
    assert list(names) == ["agents", "static_baseline", "random", "norm"]
    names = parsed(["norm", "static_baseline=runs/a,static_baseline=runs/b"])
    assert names == {"agents": [], "static_baseline": ["runs/a", "runs/b"], "norm": []}


def test_the_static_baseline_is_trained_as_the_agents_were() -> None:
    training = {"max_steps": 40, "alpha": [0.02, 0.2], "lora": "joint", "learning_rate": 3e-3}
    recipe = baseline_config(config_of(training | {"gone_option": 1}))
    assert (recipe.max_steps, recipe.alpha, recipe.lora) == (40, (0.02, 0.2), "none")
    assert recipe.learning_rate > TrainingConfig().learning_rate


def test_a_criterion_is_judged_with_the_fill_of_its_paper(folder) -> None:
    system = MicrogliaPruningSystem.from_pretrained(folder)
    task = get_task("arithmetic")
    setup = Setup(system.model, system.tokenizer, task, task.load("test", limit=3), batch_size=3)
    like, trained = system.pruner, {name: [system.pruner] for name in ("agents", "static_baseline")}

    def fills(like):
        entries = make_entries(["fluctuation,random"], setup, lambda limit, seed: setup.examples, trained, like=like)
        comparison = Comparison(setup, setup, like)
        return {entry.name: comparison.make(entry, 0).fill for entry in entries}, entries

    zeros, entries = fills(like)
    assert zeros == {"agents": "zero", "static_baseline": "zero", "fluctuation": "mean", "random": "zero"}
    means, others = fills(replace(like, fill="mean"))
    assert set(means.values()) == {"mean"}  # where the agents have it, all do
    assert [entry.identity(0)["fill"] for entry in (entries[3], others[3])] == ["zero", "mean"]


def test_the_static_baseline_gets_all_the_steps_of_a_pair() -> None:
    first, second = (
        TrainingConfig(max_steps=100, limit=3200, ramp=0.7),
        TrainingConfig(max_steps=150, limit=4800, ramp=0.0),
    )
    training = json.loads(json.dumps({"first": asdict(first), "config": asdict(second)}))
    recipe = baseline_of(training)
    assert (recipe.max_steps, recipe.limit, recipe.ramp) == (250, 8000, 0.7)
    assert recipe.learning_rate == 0.1
    alone = baseline_of({"config": training["config"]})
    assert (alone.max_steps, alone.limit) == (150, 4800)
    everything = {**training, "config": {**training["config"], "limit": None}}
    assert baseline_of(everything).limit is None


def test_losses_are_those_of_the_answers_under_hard_gates(folder) -> None:
    system = MicrogliaPruningSystem.from_pretrained(folder)
    task, pruner = get_task("arithmetic"), system.pruner
    setup = Setup(system.model, system.tokenizer, task, task.load("test", limit=5), batch_size=5)
    pruned, dense = setup.losses(pruner), setup.losses(None)
    assert replace(setup, batch_size=2).losses(pruner) == pytest.approx(pruned, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(pruned, dense, strict=True)) > 1e-3
    example = setup.examples[0]  # the same by hand: one pass, no padding, no cache
    prompt = system.tokenizer(task.template.format(question=example.question))["input_ids"]
    end = system.tokenizer.eos_token_id
    answer = [*system.tokenizer(" " + example.answer)["input_ids"], end]
    sites = find_sites(system.model)
    logits = [x[:1] for x in setup.logits(pruner)]
    keep = [pruner.gate(x, site.geometry) for x, site in zip(logits, sites, strict=True)]
    where = torch.tensor([[False] * len(prompt) + [True] * len(answer)])

    def by_hand() -> float:
        logits = system.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))

    with torch.no_grad():
        assert dense[0] == pytest.approx(by_hand(), abs=1e-4)
        with Masked(where).apply(sites, Decision(keep)):
            assert pruned[0] == pytest.approx(by_hand(), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "no checkpoint was given"),
        ("--model-path SAVED --policies shap", "criterion='shap' is unknown; choose activation_"),
        ("--model-path SAVED --policies mask=nowhere", "give name=FOLDER with a checkpoint folder"),
        ("--model-path SAVED --keep-ratios 1.5", "keep_ratios=[1.5"),
        (
            "--model-path SAVED --seeds 0,0",
            "seeds=[0, 0] was given; give at least one and none twice",
        ),
        ("--model-path SAVED,SAVED --seeds 0,1,2", "agents has 2 policies but 3 seeds were given"),
        ("--train-pairs", "--train-pairs trains agents instead of loading them"),
        (
            "--model-path SAVED --answer-limit 0.5",
            "answer_limit=0.5 was given; it must be 1 or more",
        ),
        ("--model-path SAVED --plot x.bmp", "x.bmp was given for the plot; it must end in .png"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, folder, made) -> None:
    done = run(*arguments.replace("SAVED", str(folder)).split(), *FEW, "--json")
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr
