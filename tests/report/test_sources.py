"""What runs left behind is read as it was written; what is not there is said in one sentence."""

import json

import pytest

from microglia.errors import DataError
from microglia.report import gather
from tests.report import made


def test_a_demo_is_read_in_full(tmp_path):
    found = gather([made.demo_folder(tmp_path)])
    summary = made.demo()
    (run,) = found.runs
    assert [r.policy for r in run.entries] == [
        *("dense", "pruned", "static_baseline", "random 1", "random 2"),
        *("pruned", "static_baseline"),  # with fewer heads
    ]
    pruned = run.entries[1]
    assert pruned.accuracy == summary.pruned.accuracy
    assert pruned.to_dense == summary.pruned.to_dense
    assert pruned.heads == made.heads()
    assert pruned.by["sparsity_by_family"] == summary.pruned.sparsity_by_family
    assert pruned.timing == summary.latency[3]
    assert run.entries[2].timing is None
    assert [r.accuracy for r in run.entries[5:]] == [
        summary.low_budget.pruned.accuracy,
        summary.low_budget.static_baseline.accuracy,
    ]
    assert run.low_budget == summary.low_budget
    assert [timing.row.variant for timing in found.timings] == ["dense", "masked", "compact", "compact_total"]
    assert list(found.histories.values()) == [made.history()]
    assert found.circumstances == [made.around("microglia demo")]
    assert list(found.checkpoints) == ["checkpoint"]


def test_records_alone_give_the_same_figures_as_the_details(tmp_path):
    details = gather([made.evaluation_folder(tmp_path / "a")]).runs
    records = gather([made.evaluation_folder(tmp_path / "b", details=False)]).runs
    assert len(details) == len(records) == 1
    for name in ("policy", "accuracy", "sparsity", "prompts", "ci95", "to_dense"):
        assert [getattr(r, name) for r in details[0].entries] == [getattr(r, name) for r in records[0].entries]
    assert not records[0].entries[1].heads


def test_a_comparison_a_benchmark_and_an_interrupted_training_are_read(tmp_path):
    state = tmp_path / "checkpoints" / "agents" / "checkpoint-40" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": made.history(40)}))
    compare = made.comparison_folder(tmp_path / "compare")
    found = gather([compare, made.benchmark_file(tmp_path / "cpu.jsonl"), tmp_path / "checkpoints"])
    assert len(found.runs[0].entries) == 16
    assert found.runs[0].entries[1].sparsity == pytest.approx(0.1)
    assert len(found.timings) == 12
    assert found.histories == {"checkpoints": made.history(40)}
    assert [c.command.split()[1] for c in found.circumstances] == ["compare", "benchmark"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "there is no run .*nowhere; give a folder"),
        ("answers.json", "[]", "holds no results; give the --output-dir of demo"),
        ("broken.json", "{", "broken.json cannot be read as JSON"),
        ("broken.jsonl", "[", "broken.jsonl, line 1 is not a JSON object"),
        ("torn.jsonl", "{", "torn.jsonl holds no results; give the --output-dir of demo"),
        (
            "old.json",
            '{"dataset": "gsm8k", "pruned": {"accuracy": 1}}',
            "old.json does not say what kind of result it is",
        ),
        ("newer.json", '{"kind": "demo", "version": 2}', "newer.json has version 2 of the kind 'demo'"),
        (
            "ablation.json",
            '{"kind": "ablation", "version": 1, "base": {}}',
            "ablation.json: ablation has no at_keep_ratio",
        ),
        ("history.json", '{"step": 1}', "history.json is not what microglia writes under that name"),
        ("microglia_config.json", "[]", "microglia_config.json is not what microglia writes under that name"),
        ("microglia_config.json", '{"promise": {"sentence": "x"}}', "the promise in .* does not say what kind"),
        ("records.jsonl", '{"name": "x", "unit": "ms"}', "line 1 has no value"),
    ],
)
def test_what_cannot_be_shown_is_said(name, content, sentence, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        gather([tmp_path / name])


def test_an_empty_folder_holds_no_results(tmp_path):
    with pytest.raises(DataError, match="holds no results"):
        gather([tmp_path])


def test_a_folder_with_a_result_of_an_older_microglia_is_refused(tmp_path):
    made.demo_folder(tmp_path)
    row = {name: value for name, value in made.demo().to_json().items() if name not in ("kind", "version")}
    (tmp_path / "summary.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"summary.json does not say what kind of result it is; write it again"):
        gather([tmp_path])


def test_a_folder_of_a_training_is_read(tmp_path):
    (tmp_path / "training_config.json").write_text("{}")
    (tmp_path / "history.json").write_text(json.dumps(made.history()))
    assert list(gather([tmp_path]).histories.values()) == [made.history()]
