"""The user's own file: fields by name, answers worked or short, numbers or words."""

import json
from pathlib import Path

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import get_task

TASK = get_task("jsonl")


def write(path: Path, rows: list[tuple[str, str]], fields: tuple[str, str] = ("question", "answer")) -> Path:
    path.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("answer", "gold", "right", "wrong"),
    [
        ("2 + 3 = 5\n#### 5", "5", "It is 2 + 3 = 5", "It is 6"),
        ("5 apples", "5", "The answer is 5.0", "four"),
        ("She had 9, gave 4, so 5 are left", "5", "#### 5", "9"),
        ("Paris", "paris", "The answer is Paris.", "The answer is Rome."),
        ("Thinking...\n#### New York", "new york", "Well.\nNew York", "York"),
        (
            "The capital is old.\nThe answer is Rome.",
            "rome",
            "Rome\n\nQuestion: And of France?\nAnswer: Paris",
            "Paris",
        ),
        ("yes", "yes", "Yes.", "Yes, perhaps not"),
        ("B. 5 apples", "b. 5 apples", "The answer is B. 5 apples.", "C. 5 apples"),
        ("Paris in 1990", "paris in 1990", "Well.\nParis  in 1990", "London in 1990"),
        ("#### Paris in 1990", "paris in 1990", "**Paris in 1990**", "1990"),
        ("5 feet 3 inches", "5 feet 3 inches", "5 feet 3 inches.", "5 feet 4 inches"),
        ("3, 4 and 5", "3, 4 and 5", "It is clear.\n3, 4 and 5", "2, 4 and 5"),
        ("2 1/2 hours", "2.5", "The answer is 2.5", "2"),
        ("5 apples (from 2 trees)", "5", "5", "2"),
        ("36 = 6^2", "36", "36", "6"),
        ("x = 7", "7", "7", "8"),
        ("First 3.\nThen she has 7 apples.", "7", "7", "3"),
        ("so \\boxed{5} in all", "5", "5", "6"),
        ("not enough", "not enough", "The answer is not enough.", "enough"),
        ("Rome", "rome", "<think>Paris</think>Rome", "<think>Rome</think>Paris"),
    ],
)
def test_the_final_answer_is_found(tmp_path: Path, answer: str, gold: str, right: str, wrong: str) -> None:
    path = write(tmp_path / "mine.jsonl", [("What?", answer)] * 2)
    example = TASK.load("test", data_dir=path)[0]
    assert (example.id, example.gold) == ("jsonl/mine/0", gold)
    assert TASK.correct(example, answer)
    assert TASK.correct(example, right)
    assert not TASK.correct(example, wrong)
    assert not TASK.correct(example, "")


def test_the_fields_have_the_users_names(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [("Why?", "7")], ("prompt", "target"))
    example = get_task("jsonl", question_field="prompt", answer_field="target").load("test", data_dir=path)[0]
    assert (example.question, example.gold) == ("Why?", "7")
    with pytest.raises(DataError, match=r"mine\.jsonl, line 1 has no field 'question'"):
        TASK.load("test", data_dir=path)


def test_a_file_is_split_and_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    rows = [(f"What of {n}?", str(n)) for n in range(20)]
    path = write(tmp_path / "train.jsonl", rows)
    sizes = [len(TASK.load(split, data_dir=path)) for split in ("train", "validation", "test")]
    assert sizes == [18, 2, 20]
    write(tmp_path / "test.jsonl", rows[:3])
    sizes = [len(TASK.load(split, data_dir=tmp_path)) for split in ("train", "validation", "test")]
    assert sizes == [18, 2, 3]
    write(tmp_path / "validation.jsonl", rows[:5])
    sizes = [len(TASK.load(split, data_dir=tmp_path)) for split in ("train", "validation", "test")]
    assert sizes == [20, 5, 3]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the jsonl task needs a file"):
        TASK.load("test")
    with pytest.raises(DataError, match=r"there is no file .*test\.jsonl"):
        TASK.load("test", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"example jsonl/e/0 has no text or number as question or answer"):
        TASK.load("test", data_dir=write(tmp_path / "e.jsonl", [(" ", "7")]))
    (tmp_path / "n.jsonl").write_text('{"question": "Why?", "answer": 7}\n{"question": "Why?", "answer": [7]}\n')
    with pytest.raises(DataError, match=r"example jsonl/n/1 has no text or number"):
        TASK.load("test", data_dir=tmp_path / "n.jsonl")
    (tmp_path / "n.jsonl").write_text('{"question": "Why?", "answer": 7.50}\n')
    assert TASK.load("test", data_dir=tmp_path / "n.jsonl")[0].gold == "7.5"
    with pytest.raises(DataError, match=r"leaves no example for train"):
        TASK.load("train", data_dir=write(tmp_path / "one.jsonl", [("Why?", "7")]))
    with pytest.raises(ConfigError, match="task gsm8k has no option answer_field; it has shots"):
        get_task("gsm8k", answer_field="x")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.jsonl", [("1 + 1", "2")] * 2)

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(DataError, match=r"mine\.jsonl cannot be read \(Permission denied\); mend that or give another"):
        TASK.load("test", data_dir=path)
