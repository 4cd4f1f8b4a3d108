"""What a reasoning task is: examples with worked answers, and a rule that tells whether a generated text is right."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError
from microglia.tasks.answers import extract_answer


@dataclass(frozen=True)
class Example:
    """One question with its answer."""

    id: str  # unique in its task and the same in every run, so that results can be paired by it
    question: str
    answer: str  # the worked gold answer: the training target
    gold: str  # the final answer as `normalise_answer` writes it
    difficulty: int  # number of worked steps
    family: str = ""


class Task(ABC):
    """One data set. To add one: a file with a subclass, and its line in `TASKS`."""

    name: ClassVar[str]
    template: ClassVar[str] = "Question: {question}\nAnswer:"
    splits: ClassVar[tuple[str, ...]]

    @abstractmethod
    def load(
        self, split: str, *, limit: int | None = None, seed: int = 0, data_dir: Path | str | None = None
    ) -> list[Example]:
        """The examples of a split; the same arguments give the same examples.

        limit: how many examples, drawn with `seed`, None for all that the split has; data_dir: a local folder that
        holds the data, None for where the task usually finds it.
        Raises ConfigError for an unknown split or a limit below 1, DataError when the data are missing or malformed.
        """

    def extract(self, text: str) -> str | None:
        """The normalised final answer that `text` gives, None when it gives none."""
        return extract_answer(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the final answer of the generated `text` is the example's."""
        return self.extract(text) == example.gold

    def check(self, split: str, limit: int | None) -> None:
        """Raise ConfigError unless the task has `split` and `limit` is None or at least 1."""
        if split not in self.splits:
            raise ConfigError(f"task {self.name} has no split {split!r}; choose one of {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit} but must be at least 1; leave it out to get every example there is")


def sample(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """`limit` examples drawn without replacement; all of them, in order, when limit is None.

    A larger limit with the same seed keeps the examples of a smaller one, so results can be extended.
    """
    if limit is None:
        return list(examples)
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]
