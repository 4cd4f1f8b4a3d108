"""Generated arithmetic word problems of 1 to 8 worked steps: what the embedded reasoner solves. Needs no files."""

from pathlib import Path
from typing import ClassVar

from microglia.errors import ConfigError
from microglia.reasoner.problems import SPLITS, problems
from microglia.tasks.base import BOXED, Example, Task

DEFAULT_LIMIT = 1000  # there is no end of problems, so "all" has to be some number


class ArithmeticTask(Task):
    """Word problems drawn from `microglia.reasoner.problems`; no number sequence of one split occurs in another."""

    name: ClassVar[str] = "arithmetic"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    instruction: ClassVar[str] = BOXED

    def load(
        self, split: str, *, limit: int | None = None, seed: int = 0, data_dir: Path | str | None = None
    ) -> list[Example]:
        """`limit` problems (1,000 when None), difficulties 1 to 8 in turn; `seed` decides which problems.

        Raises ConfigError for an unknown split, a limit below 1, or a data_dir, as there is nothing to read.
        """
        self.check(split, limit)
        return self.with_shots(self._drawn(split, DEFAULT_LIMIT if limit is None else limit, seed, data_dir), data_dir)

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The first of the endless problems of a split."""
        return self._drawn(split, DEFAULT_LIMIT, 0, data_dir)

    def _drawn(self, split: str, count: int, seed: int, data_dir: Path | str | None) -> list[Example]:
        if data_dir is not None:
            raise ConfigError(
                f"data_dir is {str(data_dir)!r} but the arithmetic task is generated and reads no files; leave it out"
            )
        return [
            Example(
                id=f"{self.name}/{split}/{seed}/{index}",
                question=problem.question,
                answer=problem.answer,
                gold=str(problem.result),
                difficulty=problem.steps,
                family=problem.family,
            )
            for index, problem in enumerate(problems(split, count, seed=seed))
        ]
