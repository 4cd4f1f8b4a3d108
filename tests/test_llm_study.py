"""The study on pretrained models: its arms, and the tables that are made of its records."""

import pytest

from microglia.record import Record, append_records
from scripts import llm_study, llm_tables


def note(folder, arm: str, measure: str, value: float, **extra) -> None:
    method = arm.partition("+")[0].partition("/")[0]
    about = {"arm": arm, "method": method, "recovery": "+recovery" in arm, "channels": False}
    record = Record(f"llm_study_{measure}", value, "", extra={**about, "dataset": "prompts", **extra})
    append_records(folder / f"{arm.replace('/', '-')}.jsonl", [record])


def test_arms_have_names_of_their_own_and_the_most_important_come_first():
    arms = llm_study.arms([0, 1, 2])
    names = [arm.name for arm in arms]
    assert len({*names}) == len(names)
    assert names[:2] == ["agents+recovery/0", "static+recovery/0"]
    assert {arm.seed for arm in arms if arm.method in llm_study.FIXED} == {0}


def test_fixed_criteria_train_their_recovery_and_no_gate(monkeypatch):
    monkeypatch.setattr("sys.argv", ["llm_study.py", "smollm2", "--rank", "6"])
    study = object.__new__(llm_study.Study)
    study.options = llm_study.arguments()
    config = study.config(llm_study.Arm("norm", True, 0))
    assert (config.keep_ratio, config.noise, config.alpha, config.recovery) == (None, (0.0, 0.0), (0.0, 0.0), 6)
    assert study.config(llm_study.Arm("agents", False, 0)).keep_ratio == min(llm_study.HEADS)
    assert study.config(llm_study.Arm("static", True, 0, True)).byte_share == min(llm_study.BYTES)


def test_a_cell_of_one_training_has_its_interval_and_one_of_several_their_ends(tmp_path):
    note(tmp_path, "agents/0", "kl", 0.2, keep_ratio=0.8, dense=0.0, ci95=[0.1, 0.3])
    note(tmp_path, "static/0", "kl", 0.2, keep_ratio=0.8, dense=0.0, ci95=[0.1, 0.3])
    note(tmp_path, "static/1", "kl", 0.4, keep_ratio=0.8, dense=0.0, ci95=[0.3, 0.5])
    head, _, agents, static = llm_tables.heads(tmp_path).splitlines()
    assert head == "| method | KL, 20% pruned |"
    assert agents == "| agents | 0.200 [0.100, 0.300] |"
    assert static == "| static baseline | 0.300 (0.200, 0.400) |"


def test_a_second_measurement_replaces_the_first(tmp_path):
    for value in (0.5, 0.1):
        note(tmp_path, "agents/0", "kl", value, keep_ratio=0.8, dense=0.0, ci95=[0.0, 1.0])
    assert "0.100" in llm_tables.heads(tmp_path)
    assert "0.500" not in llm_tables.heads(tmp_path)


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_what_was_not_measured_is_no_column(tmp_path, share):
    note(tmp_path, "agents/0", "top1", 0.9, keep_ratio=share)
    assert llm_tables.heads(tmp_path).splitlines()[0] == f"| method | top-1, {1 - share:.0%} pruned |"
