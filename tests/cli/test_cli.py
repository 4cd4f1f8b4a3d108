"""The command line: JSON alone on stdout, sentences for errors, the original scripts' spellings, exit codes."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import microglia
from microglia.cli.main import VERBS, app
from microglia.cli.options import PrunerOptions
from microglia.cli.train import SHOWN, kept
from microglia.errors import MicrogliaError
from microglia.record import read_records
from microglia.system import MicrogliaPruningSystem
from microglia.training import TrainingConfig
from tests.tiny_folder import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
# Fields of TrainingConfig whose option has another name, and those that go.
NAMES = {"epochs": "num_epochs", "gate": "estimator", "byte_share": "bytes"}
GONE = {"scope", "fill"}
SHORT = "--max-steps 2 --limit 4 --batch-size 2 --eval-limit 2 --hidden-dim 16".split()


def run(*arguments: object, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def only_json(result) -> dict:
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """Folder and JSON of a training of two steps, in the spelling of the original script."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    flags = "--num_epochs 1 --alpha_min 0.02 --alpha_max 0.2 --max-steps 2 --limit 4 --batch-size 2 --eval-limit 2"
    place = ["--base_model", model, "--output_dir", folder, "--hidden-dim", 16]
    return folder, only_json(run("train", *place, *flags.split(), "--json"))


def test_train_writes_a_checkpoint_and_says_so(trained):
    folder, data = trained
    assert data["output_dir"] == str(folder)
    assert data["training"]["config"]["alpha"] == [0.02, 0.2]
    assert 0 < data["agent_share"] < 1
    assert (folder / "agents.safetensors").is_file()
    assert json.loads((folder / "history.json").read_text())[-1]["step"] == 2


def test_evaluate_compares_and_writes_records(trained, tmp_path):
    flags = "--limit 2 --max-new-tokens 3".split()
    result = run("evaluate", "--model_path", trained[0], "--output_dir", tmp_path, *flags, "--json")
    data = only_json(result)
    assert data["pruned"]["prompts"] == data["dense"]["prompts"] == 2
    assert "ci95" in data["paired"]
    assert [len(site) for site in data["pruned"]["heads"]["kept"]] == [8, 8]
    assert "heads" not in data["dense"]
    assert "command" in data["circumstances"]
    names = [(r.name, r.extra.get("model")) for r in read_records(tmp_path / "records.jsonl")]
    assert names.count(("accuracy", "pruned")) == names.count(("accuracy_difference", None)) == 1
    assert json.loads((tmp_path / "evaluation-arithmetic.json").read_text()) == data
    assert len(json.loads((tmp_path / "answers-arithmetic.json").read_text())["dense"]) == 2

    table = run("evaluate", "--model-path", trained[0], *flags)
    assert table.exit_code == 0
    assert "accuracy (95 % interval)" in table.stdout
    assert "pruned minus dense" in table.stdout


def test_evaluate_and_train_read_the_users_own_file_with_shots(trained, model, tmp_path):
    rows = [{"ask": f"{n} + {n} =", "say": f"#### {2 * n}"} for n in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = ["--dataset", "jsonl", "--data-dir", tmp_path / "mine.jsonl", "--question-field", "ask"]
    flags = [*file, "--answer-field", "say", "--shots", 2, "--limit", 3]
    data = only_json(run("evaluate", "--model-path", trained[0], *flags, "--max-new-tokens", 3, "--json"))
    assert (data["dataset"], data["shots"], data["scoring"], data["pruned"]["prompts"]) == ("jsonl", 2, "generation", 3)
    steps = "--max-steps 1 --batch-size 2 --eval-limit 2 --hidden-dim 8 --json".split()
    mixture = ["--policy", "mixture"]
    data = only_json(run("train", "--model", model, "--output-dir", tmp_path / "run", *flags, *steps, *mixture))
    assert data["dataset"] == "jsonl"
    saved = MicrogliaPruningSystem.from_pretrained(tmp_path / "run")
    assert (type(saved.pruner.policy).__name__, saved.pruner.policy.hidden_dim) == ("MixturePolicy", 8)


def test_evaluate_scores_choices(trained, tmp_path):
    texts = [{"text": "red", "label": "A"}, {"text": "a longer green", "label": "B"}]
    rows = [{"id": str(n), "question": {"stem": f"Which {n}?", "choices": texts}, "answerKey": "B"} for n in range(3)]
    (tmp_path / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = ["--model-path", trained[0], "--dataset", "arc-easy", "--data-dir", tmp_path, "--output-dir", tmp_path]
    data = only_json(run("evaluate", *place, "--scoring", "likelihood-per-character", "--json"))
    assert data["scoring"] == "likelihood-per-character"
    answers = json.loads((tmp_path / "answers-arc-easy.json").read_text())
    assert [len(row["choices"]) for row in answers["pruned"]] == [2, 2, 2]
    assert read_records(tmp_path / "records.jsonl")[0].extra["scoring"] == "likelihood-per-character"


def test_evaluate_puts_several_data_sets_in_one_table_and_goes_on(trained, tmp_path):
    texts = [{"text": "red", "label": "A"}, {"text": "a longer green", "label": "B"}]
    rows = [{"id": str(n), "question": {"stem": f"Which {n}?", "choices": texts}, "answerKey": "B"} for n in range(3)]
    (tmp_path / "data" / "arc").mkdir(parents=True)
    (tmp_path / "data" / "arc" / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--dataset", "arithmetic,arc-easy,text", "--limit", "2,3,4", "--data-dir", tmp_path / "data"]
    flags += ["--output-dir", out, "--max-new-tokens", 3, "--dtype", "bfloat16"]
    data = only_json(run("evaluate", "--model-path", trained[0], *flags, "--json"))
    assert data["kind"] == "judgement"
    prompts = {(figure["dataset"], figure["prompts"]) for figure in data["figures"] if figure["measure"] != "kl"}
    assert prompts >= {("arithmetic", 2), ("arc-easy", 3), ("text", 4)}
    assert data["evaluations"].keys() == {"arithmetic", "arc-easy"}
    assert data["evaluations"]["arc-easy"]["scoring"] == "likelihood"
    assert json.loads((out / "judgement-arithmetic-arc-easy-text.json").read_text()) == data
    assert (out / "answers-arithmetic.json").is_file()
    names = {(r.name, r.extra["dataset"], r.unit) for r in read_records(out / "records.jsonl")}
    assert {
        ("kl", "text", "nats/token"),
        ("exact_prefix", "arithmetic", "tokens"),
        ("accuracy", "arc-easy", "ratio"),
    } <= names
    before = (out / "evaluation-ledger.jsonl").read_text()
    table = run("evaluate", "--model-path", trained[0], *flags)
    assert table.exit_code == 0, table.stderr
    assert "KL per token" in table.stdout
    assert "cut off at 3 tokens" in table.stdout
    assert (out / "evaluation-ledger.jsonl").read_text() == before


def test_a_run_in_the_background_says_in_its_log_how_far_it_is(trained, monkeypatch):
    flags = ["--model-path", trained[0], "--limit", 4, "--batch-size", 2, "--max-new-tokens", 2, "--no-dense"]
    assert "evaluating" not in run("evaluate", *flags).stderr  # of short runs it says nothing
    monkeypatch.setattr("microglia.cli.verb.BETWEEN_LINES", 0)
    lines = run("evaluate", *flags).stderr.splitlines()
    assert lines[0].startswith("evaluating: arithmetic, pruned, 2 of 4")
    assert lines[1].startswith("evaluating: arithmetic, pruned, 4 of 4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--dataset text,text", "name every data set once, and give one limit or one for each"),
        ("--dataset text,arithmetic --limit 1,2,3", "--dataset text,arithmetic and --limit 1,2,3 were given"),
        ("--dataset text --limit many", "--limit many was given; give numbers separated by commas"),
    ],
)
def test_evaluate_refuses_data_sets_and_limits_that_do_not_fit(trained, flags, sentence):
    result = run("evaluate", "--model-path", trained[0], *flags.split())
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_generate_answers_arguments_or_stdin(trained):
    flags = ["--model-path", trained[0], "--max-new-tokens", 3, "--keep-ratio", 0.8]
    two = only_json(run("generate", "1 + 1 =", "2 + 2 =", *flags, "--json"))
    assert [row["prompt"] for row in two["answers"]] == ["1 + 1 =", "2 + 2 ="]
    assert 0 <= two["sparsity"] < 1
    assert two["answers"][0].keys() == {"prompt", "text", "sparsity"}
    piped = run("generate", *flags, input="3 + 3 =")
    assert piped.exit_code == 0
    assert "of the heads pruned" in piped.stdout


def test_inspect_shows_a_model_and_a_checkpoint(model, trained):
    data = only_json(run("inspect", model, "--json"))
    assert data["model_class"] == "LlamaForCausalLM"
    assert [site["heads"] for site in data["sites"]] == [8, 8]
    saved = only_json(run("inspect", trained[0], "--json"))
    assert saved["agent_parameters"] == trained[1]["agent_parameters"]
    assert saved["base_model"] == str(model)
    table = run("inspect", trained[0]).stdout
    assert "0 to 1" in table
    assert "LlamaForCausalLM" in table


def test_a_script_of_the_original_project_puts_json_alone_on_stdout(trained):
    flags = "--dataset arithmetic --limit 1 --max-new-tokens 2 --no-dense --json".split()
    command = [sys.executable, "scripts/evaluate.py", "--model_path", str(trained[0]), *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pruned"]["prompts"] == 1


@pytest.mark.parametrize("name", ["train", "evaluate", "benchmark"])
def test_each_script_calls_its_verb(name):
    assert f'app(["{name}", *sys.argv[1:]])' in (ROOT / "scripts" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("evaluate --model gpt2", "no agents come with microglia for model='gpt2'; say --model-path FOLDER"),
        ("evaluate --model-path nowhere/", "there is no checkpoint folder nowhere/"),
        ("generate hello --model-path TINY", "holds no microglia_config.json"),
        ("evaluate --model-path RUN --dataset gsm9k", "there is no task 'gsm9k'; choose one of arithmetic"),
        ("evaluate --model-path RUN --question-field q", "task arithmetic has no option question_field; it has shots"),
        ("evaluate --model-path RUN --limit 1 --scoring likelihood", "has no choices to score"),
        (
            "evaluate --model-path RUN --scoring guess",
            "'--scoring': 'guess' is not one of 'generation', 'likelihood'",
        ),
        ("evaluate --model-path RUN --split best", "has no split 'best'"),
        ("evaluate --model-path RUN --dataset gsm8k --data-dir TINY", "there is no file"),
        ("evaluate --model-path RUN --output-dir RUN/README.md", "nothing can be written to"),
        (
            "evaluate --model-path RUN --path quick --limit 1",
            "execution='quick' is unknown; choose captured, compact, fast, dense or masked",
        ),
        ("evaluate --model-path RUN --device quantum", "device='quantum' cannot be used here"),
        ("evaluate --model-path RUN --dtype int3", "Invalid value for '--dtype': 'int3' is not one of 'float32'"),
        ("generate --model-path RUN", "prompt 0 of 1 is empty"),
        ("generate hello --model-path RUN --keep-ratio 7", "keep_ratio=7.0 was given; it must be above 0"),
        ("inspect nowhere/model/at/all", "neither a checkpoint folder nor a causal language model"),
        ("train --model TINY --output-dir RUN --limit 4 --max-steps 2", "already holds checkpoints of a run"),
        ("train --model TINY --output-dir NEW --resume", "holds no run to resume"),
        ("train --model TINY --output-dir NEW --schedule zigzag", "'--schedule': 'zigzag' is not one of 'linear'"),
        ("train --model TINY --policy gru", "policy='gru' is unknown; choose agents, mixture, codebook or layers"),
        ("train --model TINY --num-heads 3", "num_heads=3 was given, but the model has 8 heads"),
        ("train --model TINY --alpha 0.1,much", "alpha=0.1,much was given; give one number, or start and end as"),
        ("train --model TINY --features colour", "signals='colour' is unknown"),
        ("train --model TINY --scope answer", "--scope was dropped, 0.1.0 is the last version with it; leave it out"),
        ("train --model TINY --norm hidden", "--norm was dropped, 0.1.0 is the last version with it; leave it out"),
        ("train --keep 0.5", "No such option"),
        ("trian", "No such command 'trian'"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, model, trained, tmp_path):
    places = {"TINY": str(model), "RUN": str(trained[0]), "NEW": str(tmp_path / "new")}
    for name, place in places.items():
        arguments = arguments.replace(name, place)
    result = run(*arguments.split(), "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("microglia: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in result.stderr


def test_what_is_damaged_or_cannot_be_read_ends_in_one_sentence(model, trained, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    heads = {**json.loads((model / "config.json").read_text()), "num_attention_heads": 3}
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "config.json").write_text(json.dumps(heads))
    for result, sentence in [
        (run("inspect", tmp_path), "is neither a checkpoint folder nor a causal language model"),
        (run("inspect", tmp_path / "heads"), "3 heads in 8 groups of head size 6 make no geometry"),
        (run("generate", "--model-path", trained[0], input=b"caf\xe9"), "is not utf-8"),
        (run("generate", "a\udc00b", "--model-path", trained[0]), "half of a surrogate pair"),
    ]:
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("microglia: ")
        assert sentence in result.stderr


def test_verbose_shows_where_an_error_came_from():
    result = run("evaluate", "--model", "gpt2", "--verbose")
    assert isinstance(result.exception, MicrogliaError)


def test_ctrl_c_says_what_was_kept_and_how_to_go_on(model, tmp_path, monkeypatch):
    def stopped(self, *_, output_dir, **__):
        (output_dir / "agents" / "checkpoint-40").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(MicrogliaPruningSystem, "train", stopped)
    result = run("train", "--model", model, "--output-dir", tmp_path, "--json")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert f"{tmp_path} keeps the agents up to step 40: go on with the same command and --resume" in result.stderr
    assert yaml.safe_load((tmp_path / "train.yaml").read_text())["output-dir"] == str(tmp_path)
    assert "keeps no step; start again" in kept(tmp_path / "empty")

    monkeypatch.setattr(
        MicrogliaPruningSystem, "from_pretrained", lambda *_, **__: stopped(None, output_dir=tmp_path / "x")
    )
    result = run("generate", "hello", "--model-path", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "microglia: interrupted; nothing was written\n"


def test_version_and_help_are_there_and_light():
    assert run("--version").stdout == f"microglia {microglia.__version__}\n"
    shown = run("--help").stdout
    assert [verb.__name__ for verb in VERBS if verb.__name__ not in shown] == []
    script = "import sys, microglia.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"  # so help and completion answer at once


def options_of(verb: str) -> dict:
    """The options of a verb by name."""
    return {option.name: option for option in typer.main.get_command(app).commands[verb].params}


def test_train_shows_the_few_options_that_people_set():
    shown = run("train", "--help", env={"COLUMNS": "80"}).stdout
    names = [line.split()[1] for line in shown.splitlines() if line.startswith("│ --")]
    assert names[: len(SHOWN)] == ["--" + name.replace("_", "-") for name in SHOWN]
    assert {"--config", "--help-all", "--json"} <= {*names}
    assert len(names) <= 20
    assert len(shown.splitlines()) <= 48
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_help_all_shows_every_field_of_the_training_and_of_the_pruner_with_its_default():
    shown = " ".join(run("train", "--help-all", env={"COLUMNS": "200"}).stdout.split())
    options = options_of("train")
    for field in fields(TrainingConfig):
        if field.name in GONE:
            continue
        option = options[NAMES.get(field.name, field.name)]
        assert f"{option.opts[0]} " in shown
        assert option.help.startswith(field.type.__metadata__[0])
        value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        assert (option.name, option.default) == (option.name, value)
    for field in fields(PrunerOptions):
        assert f"--{field.name.replace('_', '-')} " in shown
    for old in ("--alpha-min", "--scope", "--norm", "--features", "--base-model"):
        assert old not in shown


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_every_option_has_a_sentence_and_old_names_are_hidden(verb):
    for option in options_of(verb).values():
        if not getattr(option, "hidden", False) or option.name in TrainingConfig.__dataclass_fields__.keys() - GONE:
            if option.help is None and option.param_type_name == "argument":
                continue  # typer before 0.25 loses it with click 8.5
            assert (option.name, option.help[-1:]) == (option.name, ".") or option.help.endswith("…")
    shown = run(verb, "--help").stdout
    assert not {"--path", "--answer-room", "--features", "--base-model", "--checkpoint"} & {*shown.split()}


def test_the_settings_of_a_run_repeat_it_and_flags_override_them(model, tmp_path):
    flags = "--alpha_min 0.02 --temperature 2 --noise 0.5 --features entropy --window 8 --lora joint --seed 3".split()
    first = only_json(run("train", "--model", model, "--output-dir", tmp_path / "a", *SHORT, *flags, "--json"))
    settings = yaml.safe_load((tmp_path / "a" / "train.yaml").read_text())
    wanted = {name.replace("_", "-") for name in options_of("train")} - {
        "json",
        "as-json",
        "verbose",
        "help",
        "help-all",
    }
    missing = wanted - settings.keys() - {"config", "resume", "alpha-min", "alpha-max", "scope", "norm"}
    assert {name for name in missing if options_of("train")[name.replace("-", "_")].default is not None} == set()
    again = ["--config", tmp_path / "a" / "train.yaml", "--output-dir", tmp_path / "b"]
    second = only_json(run("train", *again, "--json"))
    assert second["training"]["config"] == first["training"]["config"]
    assert second["training"]["config"]["temperature"] == [2.0, 2.0]
    assert second["training"]["config"]["noise"] == [0.5, 0.0]
    saved = [MicrogliaPruningSystem.from_pretrained(tmp_path / name) for name in "ab"]
    assert saved[0].pruner.fingerprint() == saved[1].pruner.fingerprint()
    assert [(s.pruner.policy.signals, s.pruner.window) for s in saved] == [(("entropy",), 8)] * 2
    third = only_json(run("train", *again[:2], "--output-dir", tmp_path / "c", "--seed", 4, "--lora", "none", "--json"))
    changed = {n for n, v in third["training"]["config"].items() if v != first["training"]["config"][n]}
    assert changed == {"seed", "lora"}


def test_a_refused_run_leaves_the_settings_of_the_run_that_is_there(trained, model):
    before = (trained[0] / "train.yaml").read_text()
    assert run("train", "--model", model, "--output-dir", trained[0], *SHORT).exit_code == 2
    assert (trained[0] / "train.yaml").read_text() == before


def test_any_verb_reads_a_file_of_options_in_yaml_or_toml(trained, tmp_path):
    (tmp_path / "a.toml").write_text(f'model_path = "{trained[0]}"\nmax-new-tokens = 2\npath = "masked"\n')
    (tmp_path / "a.yaml").write_text(f"checkpoint: {trained[0]}\nmax_new_tokens: 2\nexecution: masked\n")
    found = [
        only_json(run("generate", "1 + 1 =", "--config", tmp_path / f"a.{kind}", "--json")) for kind in ("toml", "yaml")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keep-ration: 0.5", "sets keep-ration, which is no option of train; did you mean keep-ratio"),
        ("zebra: red", "sets zebra, which is no option of train; see microglia train --help"),
        ("- 1", "holds no options; write one `name: value` in each line"),
        ("a: [", "cannot be read (while parsing"),
        ("schedule: zigzag", "'--schedule': 'zigzag' is not one of 'linear'"),
        ("config: other.yaml", "sets config, which is no option of train"),
        (None, "cannot be read (No such file or directory); give a YAML or TOML file of options"),
    ],
)
def test_a_wrong_file_of_options_ends_in_one_sentence(text, sentence, tmp_path):
    file = tmp_path / "train.yaml"
    if text is not None:
        file.write_text(text)
    result = run("train", "--config", file)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("microglia: ")
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("evaluate --path graph", "execution", "captured"),
        ("evaluate --checkpoint x", "model_path", "x"),
        ("evaluate --base_model x", "model", "x"),
        ("compare --answer-room 1.5", "answer_limit", 1.5),
        ("ablate --no-own", "as_trained", False),
        ("train --features norm", "signals", "norm"),
        ("train --gate soft", "estimator", "soft"),
        ("train --num_epochs 2", "num_epochs", 2.0),
        ("train --alpha_max 2", "alpha_max", 2.0),
    ],
)
def test_old_names_still_work(words, name, value):
    verb, *rest = words.split()
    group = typer.main.get_command(app)
    parent = group.make_context("microglia", [], resilient_parsing=True)
    assert group.commands[verb].make_context(verb, rest, parent=parent).params[name] == value
