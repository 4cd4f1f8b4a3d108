"""SVAMP: the authors' files, whose equations come out at their answers."""

import json
import re
import sys
from pathlib import Path

import pytest

from microglia.errors import DataError
from microglia.tasks import get_task
from tests.official import official

OFFICIAL, needs_official = official("svamp")
TASK = get_task("svamp")
# Rows whose published equation does not come out at their published answer, and four (121, 1913, 1118, 286) that round.
WRONG_IN_THE_DATA = {"svamp/chal-680"} | {
    f"svamp/train/{row}" for row in (121, 286, 596, 1118, 1360, 1436, 1821, 1848, 1913)
}
ROWS = [
    {"ID": "chal-1", "Body": "Tom has 7 pens.", "Question": "How many?", "Equation": "( 7.0 - 2.0 )", "Answer": 5.0},
    {
        "ID": "chal-2",
        "Body": "Ann has 2.5 m of rope",
        "Question": "How much is left?",
        "Equation": "( ( 2.5 - 1.0 ) * 2.0 )",
        "Answer": "3.0",
    },
]
BIRDS = "crows doves ducks finches geese gulls hawks larks owls".split()
TRAIN = """Question,Numbers,Equation,Answer
tom had number0 pens . he bought number1 boxes of number2 . how many now ?,3 2.0 4,+ number0 * number1 number2,11.0
""" + "".join(f"he saw number0 of number1 {bird} fly . how many stayed ?,3 9,- number1 number0,6.0\n" for bird in BIRDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "SVAMP.json").write_text(json.dumps(ROWS))
    train = tmp_path / "data/mawps-asdiv-a_svamp/train.csv"
    train.parent.mkdir(parents=True)
    train.write_text(TRAIN)
    return tmp_path


def test_an_example_is_read_as_it_will_be_learned(folder: Path) -> None:
    first, second = TASK.load("test", data_dir=folder)
    assert first.id == "svamp/chal-1"
    assert first.question == "Tom has 7 pens. How many?"
    assert (first.answer, first.gold, first.difficulty) == ("7 - 2 = 5\n#### 5", "5", 1)
    assert second.question == "Ann has 2.5 m of rope. How much is left?"
    assert second.answer == "((2.5 - 1) * 2) = 3\n#### 3"
    train = TASK.load("train", data_dir=folder) + TASK.load("validation", data_dir=folder)
    by_id = {e.id: e for e in train}
    assert len(by_id) == 10
    assert by_id["svamp/train/0"].question == "tom had 3 pens. he bought 2 boxes of 4. how many now?"
    assert by_id["svamp/train/0"].answer == "(3 + (2 * 4)) = 11\n#### 11"
    assert by_id["svamp/train/1"].answer == "9 - 3 = 6\n#### 6"


def test_the_hub_has_the_same_test_problems_and_none_to_train_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(repository: str, name: str | None, *, split: str) -> list[dict]:
            assert (repository, name) == ("ChilleD/SVAMP", None)
            return [ROWS[1]] if split == "train" else [ROWS[0]]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert TASK.load("test") == TASK.load("test", data_dir=folder)
    with pytest.raises(DataError, match="training problems are not on the hub; clone"):
        TASK.load("train")


def test_what_is_wrong_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*SVAMP\.json; data_dir must be a copy of github"):
        TASK.load("test", data_dir=folder / "nowhere")
    (folder / "SVAMP.json").write_text('[{"ID": "chal-1"}]')
    with pytest.raises(DataError, match=r"SVAMP holds a row without usable ID, Body"):
        TASK.load("test", data_dir=folder)
    (folder / "SVAMP.json").write_text("[")
    with pytest.raises(DataError, match=r"SVAMP\.json is not JSON"):
        TASK.load("test", data_dir=folder)
    (folder / "data/mawps-asdiv-a_svamp/train.csv").write_text("Question,Numbers\nnumber1,3\n")
    with pytest.raises(DataError, match=r"train\.csv holds a row without usable Question, Numbers"):
        TASK.load("train", data_dir=folder)


@needs_official
def test_every_official_equation_comes_out_at_its_answer() -> None:
    sizes = {split: TASK.load(split, data_dir=OFFICIAL) for split in TASK.splits}
    assert {split: len(examples) for split, examples in sizes.items()} == {
        "train": 2825,
        "validation": 261,
        "test": 1000,
    }
    questions = {split: {e.question for e in examples} for split, examples in sizes.items()}
    assert not {*map(str.casefold, questions["validation"])} & {*map(str.casefold, questions["train"])}
    wrong = set()
    for example in (e for examples in sizes.values() for e in examples):
        equation = example.answer.partition(" = ")[0]
        assert re.fullmatch(r"[-+*/(). 0-9]+", equation)
        if abs(eval(equation) - float(example.gold)) > 0.006:
            wrong.add(example.id)
        assert TASK.correct(example, example.answer)
        assert not TASK.correct(example, f"#### {float(example.gold) + 1}")
        assert not re.search(r"number\d", example.question)
    assert wrong == WRONG_IN_THE_DATA
