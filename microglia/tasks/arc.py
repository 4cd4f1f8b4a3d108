"""ARC: multiple-choice questions of school science (Clark et al. 2018, arXiv:1803.05457).

Two ways to judge: by generation, where the choices are listed and the answer begins with a letter, and by likelihood,
where the question stands alone and each choice's text is scored as its answer.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.tasks.answers import reply, stated, without_negated
from microglia.tasks.base import Choices, Example, Task
from microglia.tasks.rows import first_file, hub_rows, read_rows, usable_rows

HUB_ID = "allenai/ai2_arc"
FILES = {"train": "Train", "validation": "Dev", "test": "Test"}
LETTERS = "ABCDEFGH"  # some questions number their choices; all are lettered here
INSTRUCTION = "Answer with the letter of the right choice."
# A letter alone; an A before a word is the article, unless that word goes on about a choice.
LETTER = r"(?!A\s+(?!(?:because|since|as|is|and|or|for|due)\b)[a-z])([A-H])\b(?!['\u2019])"
STATED = re.compile(rf"(?:(?i:option|choice|letter)\b)?[\s*_(\[{{$\\]*(?:boxed\{{)?(?:\\?text(?:bf)?\{{)?\(?{LETTER}")
BOXED = re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?\(?([A-H])\b")
FIRST = re.compile(r"\A[\s*_(]*([A-H])(?:[.):,*]|\s*$)", re.M)
# "(C)", "C)", "so C", "I choose option C", "C is right"; not "option C is wrong".
CONCLUSION = r"(?:so|it['\u2019]s|thus|hence|therefore|choose|pick|select|is|be|answer|option|choice)"
MENTIONED = re.compile(
    rf"(?:\b(?i:{CONCLUSION})\b\W{{1,4}}{LETTER}|(?<!\w)\(?([A-H])\)"
    r"|\b([A-H])(?=\s+is\s+(?:the\s+)?(?:correct|right|best)\b))(?!\W+is\s+(?:wrong|incorrect|false|not)\b)"
)


class ArcChallengeTask(Task):
    """1,119 questions that retrieval and co-occurrence get wrong, 299 for validation, 1,172 to test on."""

    name: ClassVar[str] = "arc-challenge"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    scoring: ClassVar[str] = "likelihood"
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
        """The letter that the text gives.

        Tried in turn: the last "the answer is C", the last `\\boxed{C}`, a text that begins "C." or is just "C", the
        last mention.
        """
        text = without_negated(reply(text))
        letters = [match[1] for rest in stated(text) if (match := STATED.match(rest))]
        for found in (letters, BOXED.findall(text), FIRST.findall(text)):
            if found:
                return str(found[-1])
        mentions = ["".join(letters) for letters in MENTIONED.findall(text)]
        return mentions[-1] if mentions else None

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
