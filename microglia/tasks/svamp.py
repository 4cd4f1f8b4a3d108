"""SVAMP: elementary word problems in variations that catch shallow readers (Patel et al. 2021, arXiv:2103.07191).

All 1,000 problems are for testing; what the authors train on is MAWPS and ASDiv-A, in their repository and not on the
hub.
"""

import csv
import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.errors import DataError
from microglia.tasks.answers import normalise_answer
from microglia.tasks.base import BOXED, Example, Task, split_off
from microglia.tasks.rows import first_file, hub_rows, read_json, usable_rows

HUB_ID = "ChilleD/SVAMP"
REPOSITORY = "github.com/arkilpatel/SVAMP"
TEST_FILE = "SVAMP.json"


class SvampTask(Task):
    """1,000 problems to test on; 3,138 (500 held out) to train on, from the authors' files only."""

    name: ClassVar[str] = "svamp"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    instruction: ClassVar[str] = BOXED

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The examples of a split, from `data_dir` (the authors' repository or its data folder) or from the hub.

        Answers are the equation and `#### number`; there are no worked texts.
        Raises DataError when files or fields are missing or the hub cannot be reached, and for train from the hub.
        """
        if split == "test":
            rows = _test_rows(data_dir)
            with usable_rows("SVAMP", "ID, Body, Question, Equation, Answer"):
                return [_test_example(row) for row in rows]
        if data_dir is None:
            raise DataError(
                f"SVAMP's training problems are not on the hub; clone {REPOSITORY} and give its folder as --data-dir "
                "(data_dir=)"
            )
        path = _file(data_dir, "mawps-asdiv-a_svamp/train.csv")
        with (
            usable_rows(str(path), "Question, Numbers, Equation, Answer"),
            path.open(encoding="utf-8", newline="") as f,
        ):
            return split_off([_train_example(row, index) for index, row in enumerate(csv.DictReader(f))], split)


def _file(data_dir: Path | str, name: str) -> Path:
    advice = f"data_dir must be a copy of {REPOSITORY}, so give one or leave it out to use the hub"
    return first_file([Path(data_dir) / name, Path(data_dir) / "data" / name], advice)


def _test_rows(data_dir: Path | str | None) -> list[dict[str, Any]]:
    if data_dir is not None:
        rows = read_json(_file(data_dir, TEST_FILE))
        return list(rows) if isinstance(rows, list) else []
    instead = f"{TEST_FILE} as in {REPOSITORY}"
    rows = [row for part in ("train", "test") for row in hub_rows(HUB_ID, None, part, instead)]
    return sorted(rows, key=lambda row: int(re.sub(r"\D", "", str(row.get("ID"))) or 0))  # chal-1, chal-2, …


def _test_example(row: dict[str, Any]) -> Example:
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {row['Question'].strip()}"
    return _solved(f"svamp/{row['ID']}", question, row["Equation"], row["Answer"])


def _train_example(row: dict[str, str], index: int) -> Example:
    """Numbers stand apart from the text: number0 in the question and in an equation that is written operator first."""
    numbers = [normalise_answer(number) for number in row["Numbers"].split()]
    question = re.sub(r"\bnumber(\d+)\b", lambda match: numbers[int(match[1])], row["Question"])
    stack: list[str] = []
    for part in reversed(row["Equation"].split()):
        if part in "+-*/":
            stack.append(f"( {stack.pop()} {part} {stack.pop()} )")
        else:
            stack.append(numbers[int(part[6:])] if part.startswith("number") else part)
    question = re.sub(r"\s+([.,?!])", r"\1", question).strip()
    return _solved(f"svamp/train/{index}", question, stack.pop(), row["Answer"])


def _solved(identity: str, question: str, equation: str, answer: Any) -> Example:
    worked = re.sub(r"\d+\.\d+", lambda match: normalise_answer(match[0]), equation).strip()
    if worked.startswith("( ") and worked.endswith(" )") and worked.count("(") == 1:
        worked = worked[2:-2]
    worked = worked.replace("( ", "(").replace(" )", ")")
    gold = normalise_answer(str(float(answer)))
    return Example(identity, question, f"{worked} = {gold}\n#### {gold}", gold, len(re.findall(r" [-+*/] ", worked)))
