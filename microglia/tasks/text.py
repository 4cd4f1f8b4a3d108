"""Any text at all: how close the pruned model stays to the dense one on it. Nothing is right or wrong.

Files are cut into passages whose first half is read and whose second half is scored. Without files the prompts are the
shipped ones and the texts are what the dense model itself writes.
"""

import re
from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.base import Example, Task
from microglia.tasks.shipped import SPLITS, shipped_prompts

SUFFIXES = (".txt", ".md")
PASSAGE = 1600  # characters, some 350 tokens of English: half to read, half to score
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
            return [
                Example(f"text/{split}/{index}", row.prompt, "", "", 0, row.kind)
                for index, row in enumerate(shipped_prompts(split))
            ]
        if split != "test":
            raise ConfigError(f"split={split!r} was given, but text files are not divided; leave it out, which is test")
        place = Path(data_dir)
        paths = sorted(p for p in place.rglob("*") if p.suffix in SUFFIXES) if place.is_dir() else [place]
        examples = [example for path in paths for example in _passages(path, place)]
        if not examples:
            raise DataError(f"{place} holds no text of {SHORTEST} characters; give a file, or a folder of {SUFFIXES}")
        return examples


def _passages(path: Path, place: Path) -> list[Example]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); mend that or give another file") from error
    name = str(path.relative_to(place)) if path != place else path.name
    return [
        Example(f"text/{name}/{index}", before, after, "", 0, name, whole=True)
        for index, (before, after) in enumerate(halves(text))
    ]


def halves(text: str) -> list[tuple[str, str]]:
    """Passages of about PASSAGE characters, each cut in half, all cuts between words; nothing is left out in between.

    A rest that is shorter than SHORTEST is left out.
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
    """Before the white space that comes first at or after `near`, so that a space stays with the word behind it."""
    found = re.compile(r"\s").search(text, near)
    return found.start() if found else len(text)
