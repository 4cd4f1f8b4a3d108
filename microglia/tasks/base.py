"""What a reasoning task is: examples with worked answers, and a rule that tells whether a generated text is right."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.answers import extract_answer

VALIDATION_SIZE = 500
VALIDATION_SEED = 8  # fixed for good: another value would move examples between train and validation


@dataclass(frozen=True)
class Choices:
    """What an answer can be chosen from by likelihood: the question alone, and the texts that may follow it."""

    question: str
    texts: tuple[str, ...]
    gold: int  # place of the right text


@dataclass(frozen=True)
class Example:
    """One question with its answer."""

    id: str  # unique in its task and the same in every run, so that results can be paired by it
    question: str
    answer: str  # the worked gold answer: the training target
    gold: str  # the final answer as the task's `extract` writes it
    difficulty: int  # number of worked steps, or the data's own level, 0 where neither is known
    family: str = ""
    choices: Choices | None = None
    shots: tuple["Example", ...] = ()  # solved examples that stand before the question in its prompt
    instruction: str = ""  # what a chat model is told below the question
    whole: bool = False  # whether the question is the whole prompt, with no template or turn around it


# The wording that Qwen's model cards give for mathematics.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class Task(ABC):
    """One data set. To add one: a file with a subclass, and its line in `TASKS`.

    shots: how many solved examples a prompt begins with; they are the first of train and are left out of train.
    """

    name: ClassVar[str]
    template: ClassVar[str] = "Question: {question}\nAnswer:"
    instruction: ClassVar[str] = ""  # for chat models; a base model would take it for a part of the question
    scoring: ClassVar[str] = "generation"  # how it is judged unless somebody says otherwise
    splits: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ("shots",)

    def __init__(self, *, shots: int = 0) -> None:
        if shots < 0:
            raise ConfigError(f"shots is {shots} but cannot be negative; 0 asks the question alone")
        self.shots = shots

    @abstractmethod
    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """All examples of a split, in the order of the data. Raises DataError when they are missing or malformed."""

    def load(
        self, split: str, *, limit: int | None = None, seed: int = 0, data_dir: Path | str | None = None
    ) -> list[Example]:
        """The examples of a split; the same arguments give the same examples.

        limit: how many examples, drawn with `seed`, None for all that the split has; data_dir: a local folder that
        holds the data, None for where the task usually finds it.
        Raises ConfigError for an unknown split or a limit below 1, DataError when the data are missing or malformed.
        """
        self.check(split, limit)
        return sample(self.with_shots(self.read(split, data_dir), data_dir), limit, seed)

    def with_shots(self, examples: Sequence[Example], data_dir: Path | str | None) -> list[Example]:
        """The examples, each with the task's shots before it and none of them among its own shots.

        Without shots, which show how to answer, they carry the task's instruction instead.
        Raises ConfigError when the task has no split to take shots from, DataError when that holds too few.
        """
        if not self.shots:
            return [replace(example, instruction=self.instruction) for example in examples]
        if "train" not in self.splits:
            raise ConfigError(f"task {self.name} has no train split to take shots from; leave shots out")
        solved = tuple(self.read("train", data_dir)[: self.shots])
        if len(solved) < self.shots:
            raise DataError(f"{self.shots} shots were asked for, but train holds {len(solved)} examples; ask for fewer")
        used = {shot.id for shot in solved}
        return [replace(example, shots=solved) for example in examples if example.id not in used]

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


def split_off(examples: Sequence[Example], split: str) -> list[Example]:
    """Train or validation out of training examples that come without a validation split; all of them for test.

    500 are held out, or a tenth of a small set; which ones depends on the number of examples alone. Validation goes
    without those of them whose question stands in train word for word.
    """
    if split == "test":
        return list(examples)
    order = list(range(len(examples)))
    random.Random(VALIDATION_SEED).shuffle(order)
    held_out = frozenset(order[len(order) - min(VALIDATION_SIZE, max(1, len(order) // 10)) :])
    train = [example for index, example in enumerate(examples) if index not in held_out]
    if split == "train":
        return train
    learned = {_wording(example) for example in train}
    return [examples[index] for index in sorted(held_out) if _wording(examples[index]) not in learned]


def _wording(example: Example) -> str:
    """The question, however it is spaced and capitalised."""
    return " ".join(example.question.casefold().split())
