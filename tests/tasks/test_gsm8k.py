"""GSM8K from a folder: splits, answers and the words of its errors. The official files are used where they lie."""

import json
import sys
from pathlib import Path

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import get_task
from microglia.tasks.answers import extract_answer
from tests.official import official

OFFICIAL, needs_official = official("gsm8k")
TASK = get_task("gsm8k")


def row(number: int) -> dict[str, str]:
    worked = f"Half is {number}/2=<<{number}/2={number // 2}>>{number // 2}.\nAll is $<<1000+1=1001>>1,001."
    return {"question": f"What of {number}? ", "answer": f"{worked}\n\n#### {1000 + number:,}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 40), ("test", 5)):
        lines = [json.dumps(row(number)) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_an_example_is_read_as_it_will_be_learned(folder: Path) -> None:
    example = TASK.load("test", data_dir=folder)[4]
    assert example.id == "gsm8k/test/4"
    assert example.question == "What of 4?"
    assert example.answer == "Half is 4/2=2.\nAll is $1,001.\n\n#### 1,004"
    assert example.gold == "1004"
    assert example.difficulty == 2
    assert TASK.correct(example, "The answer is 1,004.00")
    assert not TASK.correct(example, "#### 1005")
    assert not TASK.correct(example, "no idea")


def test_train_goes_without_validation(folder: Path) -> None:
    train, validation = ([e.id for e in TASK.load(s, data_dir=folder)] for s in ("train", "validation"))
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(f"gsm8k/train/{n}" for n in range(40))
    assert validation == [e.id for e in TASK.load("validation", data_dir=folder, seed=9)]
    assert validation != [f"gsm8k/train/{n}" for n in range(36, 40)]  # shuffled, not the tail of the file


def test_validation_goes_without_what_stands_in_train(folder: Path) -> None:
    rows = [row(number) for number in range(20)]
    respelled = [{**r, "question": r["question"].upper().replace(" ", "  ")} for r in rows]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows + respelled)))
    train, validation = (TASK.load(split, data_dir=folder) for split in ("train", "validation"))
    words = [{e.question.casefold().replace("  ", " ") for e in split} for split in (train, validation)]
    assert len(train) == 36
    assert not words[0] & words[1]


def test_a_larger_limit_keeps_the_examples_of_a_smaller_one(folder: Path) -> None:
    few = TASK.load("train", limit=5, seed=1, data_dir=folder)
    more = TASK.load("train", limit=9, seed=1, data_dir=str(folder))
    assert len(few) == 5
    assert more[:5] == few
    assert TASK.load("train", limit=5, seed=2, data_dir=folder) != few
    assert len(TASK.load("test", limit=99, data_dir=folder)) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Why?"}', r"train\.jsonl, line 3 has no field 'answer'"),
        ('{"question": 7, "answer": "#### 7"}', r"train\.jsonl, line 3 has 7 as 'question'"),
        ('{"question": "Why?"', r"train\.jsonl, line 3 is not JSON"),
        ('["Why?"]', r"train\.jsonl, line 3 holds a list"),
        ('{"question": "Why?", "answer": "Seven."}', r"example 2 of GSM8K train ends in 'Seven\.'"),
        ('{"question": "Why?", "answer": "#### many"}', r"must end in '#### number'"),
    ],
)
def test_a_malformed_line_is_named(folder: Path, line: str, message: str) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        TASK.load("train", data_dir=folder)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.train\.jsonl; data_dir must be a folder with train\.jsonl and test"):
        TASK.load("train", data_dir=tmp_path / "nowhere")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"test\.jsonl holds 0 example"):
        TASK.load("test", data_dir=tmp_path)


def test_a_hub_out_of_reach_tells_of_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    with pytest.raises(DataError, match=r"ConnectionError: no route to host.*--data-dir"):
        TASK.load("test")


def test_the_hub_and_a_folder_give_the_same_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(path: str, name: str, *, split: str) -> list[dict[str, str]]:
            asked.append((path, name, split))
            return [row(number) for number in range(40)]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert TASK.load("validation") == TASK.load("validation", data_dir=folder)
    assert asked == [("openai/gsm8k", "main", "train")]


def test_unknown_splits_and_limits_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'dev'; choose one of train, validation, test"):
        TASK.load("dev", data_dir=folder)
    with pytest.raises(ConfigError, match="limit is 0 but must be at least 1"):
        TASK.load("test", limit=0, data_dir=folder)


@needs_official
def test_the_official_splits_have_their_sizes_and_share_no_question() -> None:
    splits = {split: TASK.load(split, data_dir=OFFICIAL) for split in TASK.splits}
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 6973,
        "validation": 500,
        "test": 1319,
    }
    every = [e.question for examples in splits.values() for e in examples]
    assert len({*every}) == len(every)


@needs_official
def test_every_official_answer_gives_its_own_answer() -> None:
    for split in TASK.splits:
        for example in TASK.load(split, data_dir=OFFICIAL):
            final = example.answer.split("####")[1].strip().replace(",", "")
            assert example.gold == str(int(final))
            assert extract_answer(example.answer) == example.gold
            assert TASK.correct(example, example.answer)
            assert not TASK.correct(example, f"#### {int(final) + 1}")
            assert "<<" not in example.answer
            assert 1 <= example.difficulty <= 11
