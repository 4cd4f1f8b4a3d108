"""Any text at all: how close the pruned model stays to the dense one on it. Nothing is right or wrong.

Files are cut into passages whose first half is read and whose second half is scored. Without files the prompts are the
shipped ones and the texts are what the dense model itself writes.
"""

import re
from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.base import Example, Task
from microglia.tasks.rows import read_text
from microglia.tasks.shipped import SPLITS, shipped_examples

SUFFIXES = (".txt", ".md")
PASSAGE = 1600  # characters, some 350 tokens of English: half to read, half to score
BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
SHORTEST = 200  # characters; what is left of a file below that says little


class TextTask(Task):
    """Passages of text files, or the prompts that come with microglia, answered by the dense model."""

    name: ClassVar[str] = "text"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    scoring: ClassVar[str] = "text"

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The passages of `data_dir`, a text file or a folder of them (.txt, .md), which is held out as a whole.

        Without `data_dir` the shipped prompts of the split, with empty answers. Raises ConfigError for shots, and for
        files with another split than test, DataError for files that cannot be read or hold too little text.
        """
        if self.shots:
            raise ConfigError(f"shots={self.shots} was given, but the text task has no solved examples; leave it out")
        if data_dir is None:
            return shipped_examples(split, self.name)
        if split != "test":
            raise ConfigError(f"split={split!r} was given, but text files are not divided; leave it out, which is test")
        place = Path(data_dir)
        paths = sorted(p for p in place.rglob("*") if p.suffix in SUFFIXES) if place.is_dir() else [place]
        examples = [example for path in paths for example in _passages(path, place)]
        if not examples:
            raise DataError(f"{place} holds no text of {SHORTEST} characters; give a file, or a folder of {SUFFIXES}")
        return examples


def _passages(path: Path, place: Path) -> list[Example]:
    text = read_text(path)
    name = str(path.relative_to(place)) if path != place else path.name
    return [
        Example(f"text/{name}/{index}", before, after, "", 0, name, whole=True)
        for index, (before, after) in enumerate(halves(text))
    ]


def halves(text: str) -> list[tuple[str, str]]:
    """Passages of about PASSAGE characters, each cut in half, cuts lie between words; a rest shorter than
    SHORTEST is left out.
    """
    cuts, text = [0], text.strip()
    while len(text) - cuts[-1] > PASSAGE:
        cuts.append(_between_words(text, cuts[-1] + PASSAGE))
    passages = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    pairs = []
    for passage in passages:
        middle = _between_words(passage, len(passage) // 2)
        if len(passage) >= SHORTEST and passage[:middle].strip() and passage[middle:].strip():
            pairs.append((passage[:middle].lstrip(), passage[middle:].rstrip()))
    return pairs


def _between_words(text: str, near: int) -> int:
    """Before the first space between two words at or after `near`, or right there where no such space follows.

    Only there: many tokenizers join a full stop and the line break behind it into one token.
    """
    found = BETWEEN_WORDS.search(text, near)
    return found.start() if found else near
