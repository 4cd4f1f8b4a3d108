"""The user's own problems: a JSON-lines file with a question and an answer per line."""

import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.answers import before_next_question, extract_answer, normalise_answer
from microglia.tasks.base import Example, Task, split_off
from microglia.tasks.rows import first_file, read_rows

MARKED = re.compile(r"(?:####|\banswer(?:\s+is\b|:))[ \t:]*(\S.*)", re.I)


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
        """The final number; without any number, the words of the final answer."""
        return extract_answer(text) or next(iter(_words(text)), None)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the final answers agree, as numbers where the gold answer has one and as words where it has none."""
        if extract_answer(example.answer) is not None:
            return extract_answer(text) == example.gold
        return example.gold in _words(text)

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


def _words(text: str) -> list[str]:
    """The final answer in words: the last that `####` or "the answer is" announces, or else the last or first line."""
    text = before_next_question(text)
    lines = [line for line in text.splitlines() if line.strip()]
    candidates = MARKED.findall(text)[-1:] or lines[-1:] + lines[:1]
    return [words for line in candidates if (words := normalise_answer(line))]
