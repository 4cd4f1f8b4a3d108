"""ARC: lettered for generation, alone for likelihood, and every official key is found."""

import json
import sys
from pathlib import Path

import pytest

from microglia.errors import DataError
from microglia.tasks import Choices, get_task
from tests.official import official

OFFICIAL, needs_official = official("arc")
EASY, CHALLENGE = get_task("arc-easy"), get_task("arc-challenge")
TEXTS = ["a stone", "A river", "the sea"]


def row(number: int, labels: str = "ABC") -> dict:
    choices = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    return {
        "id": f"Q_{number}",
        "question": {"stem": f"What is {number}? ", "choices": choices},
        "answerKey": labels[1],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("ARC-Easy", "ARC-Challenge"):
        (tmp_path / part).mkdir()
        for name in ("Train", "Dev", "Test"):
            lines = [json.dumps(row(number, "123" if number == 1 else "ABC")) for number in range(4)]
            (tmp_path / part / f"{part}-{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_an_example_lists_its_choices_and_carries_them(folder: Path) -> None:
    first, numbered = CHALLENGE.load("test", data_dir=folder)[:2]
    assert first.id == "arc-challenge/Q_0"
    assert first.question == (
        "What is 0?\nA. a stone\nB. A river\nC. the sea\nAnswer with the letter of the right choice."
    )
    assert (first.answer, first.gold) == ("B. A river", "B")
    assert first.choices == Choices("What is 0?", tuple(TEXTS), 1)
    assert numbered.gold == "B"  # labels 1, 2, 3 are lettered
    assert CHALLENGE.load("test", data_dir=folder / "ARC-Challenge")[0] == first
    assert EASY.load("test", data_dir=folder)[0].id == "arc-easy/Q_0"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B. A river", "B"),
        ("(B) because a stone is dry", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B) A river, not (A).", "B"),
        ("**Answer: B**", "B"),
        ("Thus \\boxed{B}", "B"),
        ("Thus \\boxed{\\text{B}} it is", "B"),
        ("A river flows, so I choose option B", "B"),
        ("First (A) is dry. Then (B) is wet.", "B"),
        ("B. A river\n\nQuestion: What?\nThe answer is C.", "B"),
        ("The answer is A. No: the answer is B.", "B"),
        ("The answer is: B", "B"),
        ("The answer is option B", "B"),
        ("The answer is B. Option A is wrong because it is dry.", "B"),
        ("The answer is (B), since option (A) is wrong", "B"),
        ("The answer is A because a stone is dry", "A"),
        ("A plant needs water, so B.", "B"),
        ("A plant needs vitamin C, so it must be B because of that", "B"),
        ("Option B is right. Option A is wrong.", "B"),
        ("It is (B), not (C).", "B"),
        ("A stone is dry. B is the right answer.", "B"),
        ("I think it's B", "B"),
        ("$\\boxed{\\textbf{B}}$", "B"),
        ("The answer is not C. Therefore, B", "B"),
        ("<think>The answer is A.</think>B", "B"),
        ("The answer is not (A).", None),
        ("The answer is A river.", None),
        ("A river is wet.", None),
        ("The answer is a river.", None),
        ("", None),
    ],
)
def test_the_letter_is_found(text: str, letter: str | None) -> None:
    assert EASY.extract(text) == letter


def test_the_hub_and_a_folder_give_the_same_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(repository: str, name: str, *, split: str) -> list[dict]:
            assert (repository, name, split) == ("allenai/ai2_arc", "ARC-Easy", "validation")
            rows = [row(number, "123" if number == 1 else "ABC") for number in range(4)]
            return [
                {
                    "id": r["id"],
                    "question": r["question"]["stem"],
                    "choices": {key: [c[key] for c in r["question"]["choices"]] for key in ("text", "label")},
                    "answerKey": r["answerKey"],
                }
                for r in rows
            ]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert EASY.load("validation") == EASY.load("validation", data_dir=folder)


def test_what_is_wrong_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*ARC-Easy-Test\.jsonl; data_dir must hold ARC-Easy"):
        EASY.load("test", data_dir=folder / "nowhere")
    path = folder / "ARC-Easy" / "ARC-Easy-Test.jsonl"
    path.write_text(json.dumps({**row(0), "answerKey": "E"}))
    with pytest.raises(DataError, match=r"ARC-Easy, test, holds a row without usable id"):
        EASY.load("test", data_dir=folder)
    path.write_text('{"id": "1"}')
    with pytest.raises(DataError, match=r"line 1 has no field 'question'"):
        EASY.load("test", data_dir=folder)


@needs_official
@pytest.mark.parametrize(("task", "sizes"), [(CHALLENGE, (1119, 299, 1172)), (EASY, (2251, 570, 2376))])
def test_every_official_key_is_found_and_no_other(task, sizes: tuple[int, ...]) -> None:
    for split, size in zip(task.splits, sizes, strict=True):
        examples = task.load(split, data_dir=OFFICIAL)
        assert len(examples) == len({e.id for e in examples}) == size
        for e in examples:
            assert e.choices is not None
            assert task.correct(e, e.answer)
            assert f"\n{e.gold}. {e.choices.texts[e.choices.gold]}\n" in e.question
            for place, text in enumerate(e.choices.texts):
                for said in ("{}. {}", "The answer is ({}) {}", "{}", "\\boxed{{{}}}"):
                    letter = "ABCDE"[place]
                    assert task.correct(e, said.format(letter, text)) == (place == e.choices.gold)
