"""ARC: multiple-choice questions of school science (Clark et al. 2018, arXiv:1803.05457).

Two ways to judge: by generation, where the choices are listed and the answer begins with a letter, and by likelihood,
where the question stands alone and each choice's text is scored as its answer.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.tasks.answers import before_next_question
from microglia.tasks.base import Choices, Example, Task
from microglia.tasks.rows import first_file, hub_rows, read_rows, usable_rows

HUB_ID = "allenai/ai2_arc"
FILES = {"train": "Train", "validation": "Dev", "test": "Test"}
LETTERS = "ABCDEFGH"  # some questions number their choices; all are lettered here
INSTRUCTION = "Answer with the letter of the right choice."
LETTER = r"[\s*_(\[{$\\]*(?:boxed\{)?(?:\\?text\{)?\(?([A-H])\b(?!['\u2019])"
# Tried in turn: "the answer is (C)", \boxed{C}, a text that begins "C." or is just "C", the last "(C)" or "C)".
PATTERNS = (
    re.compile(r"\b(?:answer|choice|option)\b\W{0,4}(?:is|would be|must be|[:=])?" + LETTER, re.I),
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-H])\b"),
    re.compile(r"^[\s*_(]*([A-H])(?:[.):,*]|\s*$)", re.M),
    re.compile(r"(?<!\w)\(?([A-H])\)"),
)


class ArcChallengeTask(Task):
    """1,119 questions that retrieval and co-occurrence get wrong, 299 for validation, 1,172 to test on."""

    name: ClassVar[str] = "arc-challenge"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    part: ClassVar[str] = "ARC-Challenge"

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The examples of a split, from `data_dir` (the folder of the official archive, or of the part) or the hub.

        Raises DataError when files or fields are missing or the hub cannot be reached.
        """
        name = f"{self.part}-{FILES[split]}.jsonl"
        rows = hub_rows(HUB_ID, self.part, split, name) if data_dir is None else self._rows(Path(data_dir), name)
        with usable_rows(f"{self.part}, {split},", "id, question, choices and answerKey"):
            return [self._example(row) for row in rows]

    def extract(self, text: str) -> str | None:
        """The letter that the text gives; what follows a new `Question:` is the model's own invention."""
        text = before_next_question(text)
        for pattern in PATTERNS:
            if letters := [letter for letter in pattern.findall(text) if letter.isupper()]:
                return str(letters[0] if pattern is PATTERNS[2] else letters[-1])
        return None

    def _rows(self, folder: Path, name: str) -> list[dict[str, Any]]:
        advice = (
            f"data_dir must hold {self.part} as in the archive that allenai.org/data/arc offers, so give such a folder "
            "or leave it out to use the hub"
        )
        path = first_file([folder / self.part / name, folder / name], advice)
        return read_rows(path, ("id", "question", "answerKey"), texts=False)

    def _example(self, row: dict[str, Any]) -> Example:
        if isinstance(row["question"], str):  # the hub's columns
            stem, labels, texts = row["question"], list(row["choices"]["label"]), list(row["choices"]["text"])
        else:
            stem, choices = row["question"]["stem"], row["question"]["choices"]
            labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
        gold = labels.index(row["answerKey"])
        texts = [text.strip() for text in texts]
        listed = "\n".join(f"{LETTERS[place]}. {text}" for place, text in enumerate(texts))
        return Example(
            id=f"{self.name}/{row['id']}",
            question=f"{stem.strip()}\n{listed}\n{INSTRUCTION}",
            answer=f"{LETTERS[gold]}. {texts[gold]}",
            gold=LETTERS[gold],
            difficulty=0,
            choices=Choices(stem.strip(), tuple(texts), gold),
        )


class ArcEasyTask(ArcChallengeTask):
    """The other questions: 2,251, 570 for validation, 2,376 to test on."""

    name: ClassVar[str] = "arc-easy"
    part: ClassVar[str] = "ARC-Easy"
