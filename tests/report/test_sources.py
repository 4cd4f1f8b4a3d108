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
    assert [r.policy for r in run.results] == [
        *("dense", "pruned", "static", "random 1", "random 2"),
        *("pruned", "static"),  # with fewer heads
    ]
    pruned = run.results[1]
    assert pruned.accuracy == summary["pruned"]["accuracy"]
    assert pruned.diff_ci95 == tuple(summary["pruned"]["diff_ci95"])
    assert pruned.heads == made.heads()
    assert pruned.by["sparsity_by_family"] == summary["pruned"]["sparsity_by_family"]
    assert pruned.timing["ratio_to_dense"] == summary["latency"][3]["ratio_to_dense"]
    assert run.results[2].timing is None
    assert [r.accuracy for r in run.results[5:]] == [
        summary["scarce"][name]["accuracy"] for name in ("pruned", "static")
    ]
    assert run.scarce == {**summary["scarce"]["adaptivity"], "sparsity": 0.398}
    assert [row["variant"] for row in found.timings] == ["dense", "masked", "compact", "compact_total"]
    assert list(found.histories.values()) == [made.history()]
    assert found.circumstances == [{**made.AROUND, "command": "microglia demo"}]
    assert list(found.checkpoints) == ["checkpoint"]


def test_records_alone_give_the_same_figures_as_the_details(tmp_path):
    details = gather([made.evaluation_folder(tmp_path / "a")]).runs
    records = gather([made.evaluation_folder(tmp_path / "b", details=False)]).runs
    assert len(details) == len(records) == 1
    for name in ("policy", "accuracy", "sparsity", "prompts", "ci95", "diff", "diff_ci95", "p_value"):
        assert [getattr(r, name) for r in details[0].results] == [getattr(r, name) for r in records[0].results]
    assert not records[0].results[1].heads


def test_a_comparison_a_benchmark_and_an_interrupted_training_are_read(tmp_path):
    state = tmp_path / "checkpoints" / "agents" / "checkpoint-40" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": made.history(40)}))
    compare = made.comparison_folder(tmp_path / "compare")
    found = gather([compare, made.benchmark_file(tmp_path / "cpu.jsonl"), tmp_path / "checkpoints"])
    assert len(found.runs[0].results) == 16
    assert found.runs[0].results[1].sparsity == pytest.approx(0.1)
    assert len(found.timings) == 12
    assert found.histories == {"checkpoints": made.history(40)}
    assert [c["command"].split()[1] for c in found.circumstances] == ["compare", "benchmark"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "there is no run .*nowhere; give a folder"),
        ("answers.json", "[]", "holds no results; give the --output-dir of demo"),
        ("broken.json", "{", "broken.json cannot be read as JSON"),
        ("broken.jsonl", "{", "broken.jsonl cannot be read as JSON"),
        ("old.json", '{"dataset": "gsm8k", "pruned": {"accuracy": 1}}', "old.json lacks what a report needs.*sparsity"),
        ("ablation.json", '{"base": {}, "rows": [{"variant": "base"}]}', "ablation.json lacks what .*accuracy"),
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
