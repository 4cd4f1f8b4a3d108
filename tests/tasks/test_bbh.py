"""BIG-Bench Hard: every kind of answer is told right from wrong, on the official questions and the authors' prompts."""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import get_task
from microglia.tasks.base import Example
from microglia.tasks.bbh import INSTRUCTION, LOGIC, TASKS_27
from tests.official import official

OFFICIAL, needs_official = official("bbh")
TASK = get_task("bbh")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two made-up questions a task, and prompt files with two worked examples."""
    for kind in ("bbh", "cot-prompts"):
        (tmp_path / kind).mkdir()
    for task in TASKS_27:
        rows = [{"input": f"What of {task} {number}?", "target": f"({'AB'[number]})"} for number in range(2)]
        (tmp_path / "bbh" / f"{task}.json").write_text(json.dumps({"examples": rows}))
        worked = [f"Q: Which {n}?\nOptions:\n(A) a\nA: Let us see.\nSo the answer is (A)." for n in range(2)]
        text = "do not train on this\n-----\nChoose one.\n\n" + "\n\n".join(worked) + "\n"
        (tmp_path / "cot-prompts" / f"{task}.txt").write_text(text)
    return tmp_path


def example(gold: str) -> Example:
    return Example("bbh/x/0", "?", "", gold, 0)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("(B)", "Let's think step by step. So the answer is (B)."),
        ("(B)", "The answer is B"),
        ("(B)", "B. the red one"),
        ("(B)", "**(B)**"),
        ("(B)", "the answer is (A). No, the answer is (B) the red one"),
        ("(B)", "the answer is option B."),
        ("(B)", "The answer is (B). The answer is not (A)."),
        ("(B)", "The answer is:\n\n(B)"),
        ("(B)", "<think>the answer is (A)</think>the answer is (B)"),
        ("Yes", "So the answer is yes."),
        ("No", "the answer is: **No**, he does not"),
        ("True", "so the answer is True.\n\nQ: not True is\nA: the answer is False."),
        ("valid", 'So the answer is "valid".'),
        ("-14", "So the answer is \u221214."),
        ("-14", "Answer: -14.0"),
        ("8", "the answer is 8 of the 10 things"),
        ("8", "I count them: the answer is 3 + 5 = 8."),
        ("] ) >", "So the answer is ])>."),
        ("] ) >", "] ) >"),
        ("apple bear", "So the answer is apple, bear."),
        ("apple bear", "apple bear"),
        ("Monsters, Inc", "So the answer is Monsters, Inc."),
    ],
)
def test_a_right_answer_is_seen(gold: str, text: str) -> None:
    assert TASK.correct(example(gold), text)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("(B)", "So the answer is (A)."),
        ("(B)", "the answer is (B). No, the answer is (A)."),
        ("(B)", "the answer is not (B)"),
        ("(B)", "So the answer isn't (B)."),
        ("(B)", "The answer is not option B."),
        ("(B)", "<think>the answer is (B)"),
        ("Yes", "So the answer is no."),
        ("valid", "So the answer is invalid."),
        ("invalid", "So the answer is valid."),
        ("-14", "So the answer is 14."),
        ("] ) >", "So the answer is ] ) > >."),
        ("apple bear", "So the answer is bear apple."),
        ("apple bear", "So the answer is apple."),
        ("8", "So the answer is eight."),
        ("(B)", ""),
    ],
)
def test_a_wrong_answer_is_seen(gold: str, text: str) -> None:
    assert not TASK.correct(example(gold), text)


def test_zero_shot_asks_for_steps_and_few_shot_shows_them(folder: Path) -> None:
    asked = TASK.load("test", data_dir=folder)
    assert len(asked) == 54
    assert asked[0].id == "bbh/boolean_expressions/0"
    assert asked[0].question == f"What of boolean_expressions 0?\n{INSTRUCTION}"
    assert asked[0].answer == "So the answer is (A)."
    shown = get_task("bbh", shots=2).load("test", data_dir=folder)
    assert [shot.question for shot in shown[0].shots] == [
        "Choose one.\n\nWhich 0?\nOptions:\n(A) a",
        "Which 1?\nOptions:\n(A) a",
    ]
    assert shown[0].shots[1].answer == "Let us see.\nSo the answer is (A)."
    assert shown[0].question == "What of boolean_expressions 0?"
    assert {shot.family for e in shown for shot in e.shots if shot.family != e.family} == set()


def test_the_logic_subset_is_a_part(folder: Path) -> None:
    logic = get_task("bbh-logic").load("test", data_dir=folder)
    assert {e.family for e in logic} == {*LOGIC} < {*TASKS_27}
    assert {e.id for e in logic} < {e.id for e in TASK.load("test", data_dir=folder)}


def test_the_hub_and_a_folder_give_the_same_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(repository: str, name: str, *, split: str) -> list[dict[str, str]]:
            assert (repository, split) == ("SaylorTwift/bbh", "test")
            return json.loads((folder / "bbh" / f"{name}.json").read_text())["examples"]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert TASK.load("test") == TASK.load("test", data_dir=folder)
    with pytest.raises(ConfigError, match="BBH's worked examples are not on the hub; clone"):
        get_task("bbh", shots=3).load("test")


def test_what_is_wrong_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="task bbh has no split 'train'; choose one of test"):
        TASK.load("train", data_dir=folder)
    with pytest.raises(ConfigError, match="3 shots were asked for, but BBH has 2 a task"):
        get_task("bbh", shots=3).load("test", data_dir=folder)
    (folder / "cot-prompts" / "navigate.txt").write_text("no questions")
    with pytest.raises(DataError, match=r"navigate\.txt holds no questions 'Q:' with answers 'A:'"):
        get_task("bbh", shots=1).load("test", data_dir=folder)
    (folder / "bbh" / "navigate.json").write_text('{"examples": [{"input": "?"}]}')
    with pytest.raises(DataError, match=r"BBH navigate holds a row without usable input and target"):
        TASK.load("test", data_dir=folder)
    (folder / "bbh" / "navigate.json").unlink()
    with pytest.raises(DataError, match=r"there is no file .*navigate\.json; data_dir must be a copy of github"):
        TASK.load("test", data_dir=folder)


@needs_official
def test_every_official_target_is_right_and_no_other_target_of_its_task() -> None:
    examples = TASK.load("test", data_dir=OFFICIAL)
    assert len(examples) == len({e.id for e in examples}) == 6511
    assert len(get_task("bbh-logic").load("test", data_dir=OFFICIAL)) == 1500
    assert [e.id for e in examples if not TASK.correct(e, f"Let's see.\nSo the answer is {e.gold}.")] == []
    golds: dict[str, set[str]] = defaultdict(set)
    for e in examples:
        golds[e.family].add(e.gold)
    assert len(golds) == 27
    draw = random.Random(0)
    for e in examples:
        others = sorted(golds[e.family] - {e.gold})
        for other in draw.sample(others, min(3, len(others))):
            assert not TASK.correct(e, f"So the answer is {other}."), (e.id, e.gold, other)


@needs_official
def test_every_worked_example_of_the_authors_gives_its_own_answer() -> None:
    shown = get_task("bbh", shots=3).load("test", data_dir=OFFICIAL)
    shots = {shot.id: shot for e in shown for shot in e.shots}
    assert len(shots) == 81
    assert [shot.id for shot in shots.values() if not shot.gold or not TASK.correct(shot, shot.answer)] == []
    assert all(shot.answer.startswith("Let's think step by step") for shot in shots.values())
    assert not any("canary" in e.shots[0].question for e in shown)
