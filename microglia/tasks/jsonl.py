"""The user's own problems: a JSON-lines file with a question and an answer per line."""

import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.answers import ANSWER_IS, NUMBER, extract_answer, quantity, reply, stated
from microglia.tasks.base import Example, Task, split_off
from microglia.tasks.rows import first_file, read_rows

MARKER = re.compile(rf"####|{ANSWER_IS.pattern}", re.I)
# What announces a number inside a phrase: "so 5 are left", "which makes 12"; "in 1990" does not.
ANNOUNCED = re.compile(
    r"(?:[=≈~]|\b(?:so|thus|hence|therefore|then|is|are|was|were|be|has|have|had|gets?|makes?|gives?|leaves?|leaving"
    r"|costs?|equals?|needs?|total|about|around|approximately|approx)\b)[\s$€£*:.]*$",
    re.I,
)


class JsonlTask(Task):
    """`data_dir` is a file, or a folder with train.jsonl, test.jsonl and perhaps validation.jsonl.

    A single file is its own train, validation (a tenth of it) and test: give a folder to judge on problems that were
    not trained on. Answers may be worked; the final one is what `#### …` or "the answer is …" says, or a last number.
    """

    name: ClassVar[str] = "jsonl"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    options: ClassVar[tuple[str, ...]] = ("shots", "question_field", "answer_field")

    def __init__(self, *, shots: int = 0, question_field: str = "question", answer_field: str = "answer") -> None:
        super().__init__(shots=shots)
        self.fields = (question_field, answer_field)

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The examples of a split. Raises ConfigError without a data_dir, DataError for a missing or empty file."""
        if data_dir is None:
            raise ConfigError("the jsonl task needs a file; give it, or a folder with test.jsonl, as --data-dir")
        place = Path(data_dir)
        has_validation = (place / "validation.jsonl").is_file()
        source = "train" if split == "validation" and not has_validation else split
        advice = f"data_dir must be a JSON-lines file or a folder with {source}.jsonl"
        path = place if place.is_file() else first_file([place / f"{source}.jsonl"], advice)
        rows = read_rows(path, self.fields, texts=False)
        examples = [self._example(row, f"{self.name}/{path.stem}/{index}") for index, row in enumerate(rows)]
        if not has_validation:
            examples = split_off(examples, split)
        if not examples:
            raise DataError(f"{path} leaves no example for {split}; give a file with more lines")
        return examples

    def extract(self, text: str) -> str | None:
        """The final answer: a number where it is one, or else its words."""
        if (phrases := _final_phrases(text)) and (number := _number(phrases[0], text)):
            return number
        return next((words for phrase in phrases if (words := _words(phrase))), None)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the final answers agree, as numbers where the gold answer is one and as words where it is none."""
        if NUMBER.fullmatch(example.gold):
            return extract_answer(text) == example.gold
        return example.gold in [_words(phrase) for phrase in _final_phrases(text)]

    def _example(self, row: dict[str, Any], identity: str) -> Example:
        texts = [str(row[field]).strip() if isinstance(row[field], str | int | float) else "" for field in self.fields]
        question, answer = texts
        gold = self.extract(answer)
        if not question or gold is None:
            raise DataError(
                f"example {identity} has no text or number as {' or '.join(self.fields)}; fill in or delete that line"
            )
        steps = max(1, sum(1 for line in answer.splitlines() if line.strip() and not line.startswith("####")))
        return Example(identity, question, answer, gold, difficulty=steps)


def _final_phrases(text: str) -> list[str]:
    """What the last `####` or "the answer is" announces, or else the last and the first line."""
    text = reply(text)
    lines = [line for line in text.splitlines() if line.strip()]
    return stated(text, MARKER)[-1:] or lines[-1:] + lines[:1]


def _number(phrase: str, text: str) -> str | None:
    """The number that a final phrase is or comes to; None for words, with or without a number among them."""
    if number := quantity(phrase):
        return number
    if (last := [*NUMBER.finditer(phrase)][-1:]) and ANNOUNCED.search(phrase[: last[0].start()]):
        return extract_answer(text)
    return extract_answer(text) if "\\boxed" in phrase else None


def _words(phrase: str) -> str:
    """One spelling for one phrase, without emphasis, a full stop and capitals."""
    return " ".join(phrase.split()).strip("*_ ").rstrip(".").strip("*_ ").casefold()
