"""Prompts without answers, from files, from other tasks, or those that ship: what a training without labels needs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.base import Example, Task, split_off
from microglia.tasks.rows import first_file, read_rows, read_text
from microglia.tasks.shipped import SPLITS, shipped_examples

SHIPPED = "shipped"
SUFFIXES = (".jsonl", ".txt")


class PromptsTask(Task):
    """`data_dir` names one source or several, separated by commas; without it the shipped prompts are taken.

    A source is a file (`.txt` with a prompt per line, or JSON lines with `prompt`), a folder with train, validation
    and test in such files, `shipped`, a task (`arithmetic`), or a task with the place of its files (`gsm8k=FOLDER`).
    A single file is its own train and validation (a tenth of it), and as a whole test.
    """

    name: ClassVar[str] = "prompts"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    scoring: ClassVar[str] = "text"
    options: ClassVar[tuple[str, ...]] = ()

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The prompts of every source in turn, a prompt that stands in several once; answers are empty.

        Raises ConfigError for a task that does not exist or lacks the split, DataError for files that are missing or
        malformed.
        """
        sources = [word for word in str(data_dir or SHIPPED).split(",") if word]
        found = [example for source in sources for example in _of_source(source.strip(), split)]
        once: dict[tuple[str, str], Example] = {}
        for example in found:
            once.setdefault((example.question, example.instruction), example)
        if not once:
            raise DataError(f"{data_dir} leaves no prompt for {split}; give a file with more lines")
        return list(once.values())

    def with_shots(self, examples: Sequence[Example], data_dir: Path | str | None) -> list[Example]:
        """As they are: each prompt is asked as its own task asks it."""
        return list(examples)


def _of_source(source: str, split: str) -> list[Example]:
    from microglia.tasks import TASKS, get_task

    if source == SHIPPED:
        return shipped_examples(split, SHIPPED)
    name, _, place = source.partition("=")
    if name in TASKS and name != PromptsTask.name:
        examples = get_task(name).load(split, data_dir=place or None)
        return [replace(e, answer="", gold="", choices=None, family=name) for e in examples]
    if not Path(source).exists():
        raise ConfigError(
            f"{source!r} is no file, folder or task to take prompts from; give FILE, {SHIPPED}, TASK or TASK=FOLDER, "
            "several of them separated by commas"
        )
    return _of_files(Path(source), split)


def _of_files(place: Path, split: str) -> list[Example]:
    """The prompts of a file, or of a folder with one for each split; validation may be a tenth of train."""
    path, whole = place, False
    if place.is_dir():
        whole = split != "validation" or any((place / f"validation{suffix}").is_file() for suffix in SUFFIXES)
        named = [place / f"{split if whole else 'train'}{suffix}" for suffix in SUFFIXES]
        path = first_file(named, f"a folder of prompts must hold {named[0].name} or {named[1].name}")
        # Held out of train only where it has no file of its own.
        whole = whole and (split != "train" or any((place / f"validation{s}").is_file() for s in SUFFIXES))
    texts = _texts(path)
    examples = [Example(f"{path.stem}/{index}", text, "", "", 0, path.stem) for index, text in enumerate(texts)]
    return examples if whole else split_off(examples, split)


def _texts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        lines = read_text(path).splitlines()
    else:
        lines = [row["prompt"] for row in read_rows(path, ("prompt",))]
    return [line.strip() for line in lines if line.strip()]
