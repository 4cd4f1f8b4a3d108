"""MATH: competition mathematics with worked answers (Hendrycks et al. 2021, arXiv:2103.03874), and MATH-500.

MATH-500 (Lightman et al. 2023, arXiv:2305.20050) is a part of MATH's test split: never report both as independent.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from microglia.errors import DataError
from microglia.tasks.answers import braced, extract_answer, reply, stated
from microglia.tasks.base import Example, Task, split_off
from microglia.tasks.equivalence import check_installed, equivalent
from microglia.tasks.rows import first_file, hub_rows, read_json, read_rows

HUB_ID = "EleutherAI/hendrycks_math"
HUB_ID_500 = "HuggingFaceH4/MATH-500"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
INSTRUCTION = "Put the final answer in \\boxed{}."
BOX = re.compile(r"\\(?:boxed|fbox)\b\s*")
SENTENCE_ENDS = re.compile(r"\.(?=\s|$)")
LONGEST_BOX = 2000  # characters read in search of the closing brace


class MathTask(Task):
    """7,500 problems to train on (500 of them held out as validation) and 5,000 to test on."""

    name: ClassVar[str] = "math"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The examples of a split, from `data_dir` or from the hub.

        data_dir: a folder with train.jsonl and test.jsonl, rows of problem and solution, or the official archive's,
        with train/algebra/1.json and so on. Raises ConfigError when math-verify, which judges, is not installed,
        DataError when files or fields are missing, a solution boxes no answer, or the hub cannot be reached.
        """
        check_installed(self.name)
        source = "test" if split == "test" else "train"
        rows = self.hub_rows(source) if data_dir is None else self.folder_rows(Path(data_dir), source)
        return split_off([self._example(row, source, index) for index, row in enumerate(rows)], split)

    def extract(self, text: str) -> str | None:
        """What the last `\\boxed{…}` holds, or else what follows the last "the answer is", or the last number."""
        text = reply(text)
        if (boxed := last_boxed(text)) is not None:
            return boxed
        if rests := stated(text):
            return SENTENCE_ENDS.split(rests[-1])[0].strip().strip("$*").strip() or None
        return extract_answer(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the final answer of `text` equals the example's as mathematics: 0.5 for 1/2, x=3 for 3."""
        answer = self.extract(text)
        return answer is not None and equivalent(example.gold, answer)

    def hub_rows(self, source: str) -> list[dict[str, Any]]:
        """The rows of a split on the hub, each with its place there as unique_id."""
        return [
            row | {"unique_id": f"{source}/{subject}/{index}"}
            for subject in SUBJECTS
            for index, row in enumerate(hub_rows(HUB_ID, subject, source, "train.jsonl and test.jsonl"))
        ]

    def folder_rows(self, folder: Path, source: str) -> list[dict[str, Any]]:
        """The rows of a split in a local folder."""
        path = folder / f"{source}.jsonl"
        if path.is_file():
            return read_rows(path, ("problem", "solution"))
        if files := sorted((folder / source).glob("*/*.json"), key=lambda f: (f.parent.name, len(f.name), f.name)):
            return [{**read_json(file), "unique_id": f"{source}/{file.parent.name}/{file.stem}"} for file in files]
        raise DataError(
            f"there is neither {path} nor a folder {folder / source} with the official archive's files; give such a "
            "folder as --data-dir or leave it out to use the hub"
        )

    def _example(self, row: dict[str, Any], source: str, index: int) -> Example:
        identity = str(row.get("unique_id", f"{source}/{index}")).removesuffix(".json")
        problem, solution = row.get("problem"), row.get("solution")
        gold = row.get("answer") or (last_boxed(solution) if isinstance(solution, str) else None)
        if not isinstance(problem, str) or not isinstance(solution, str) or not isinstance(gold, str):
            raise DataError(
                f"example {identity} of {self.name} needs a problem and a solution that boxes its answer; mend it"
            )
        level = re.search(r"\d", str(row.get("level", "")))
        return Example(
            id=f"math/{identity}",
            question=f"{problem.strip()}\n{INSTRUCTION}",
            answer=solution.strip(),
            gold=gold.strip(),
            difficulty=int(level[0]) if level else 0,
            family=str(row.get("subject") or row.get("type") or ""),
        )


class Math500Task(MathTask):
    """The 500 problems of MATH's test split that most papers report."""

    name: ClassVar[str] = "math-500"
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def hub_rows(self, source: str) -> list[dict[str, Any]]:
        """The rows of the one split on the hub."""
        return hub_rows(HUB_ID_500, None, source, "test.jsonl")

    def folder_rows(self, folder: Path, source: str) -> list[dict[str, Any]]:
        """The rows of math500_test.jsonl or test.jsonl. Raises DataError when the file is not MATH-500's."""
        advice = "give MATH-500's folder or leave it out to use the hub"
        path = first_file([folder / "math500_test.jsonl", folder / "test.jsonl"], advice)
        return read_rows(path, ("problem", "solution", "answer", "unique_id"))  # unique_id: not the whole of MATH


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` (or `\\boxed 5`) holds, braces inside followed; None without one that is closed."""
    for box in reversed([*BOX.finditer(text)]):
        start = box.end()
        if text[start : start + 1] != "{":
            if bare := re.match(r"[^\s$.,]+", text[start:]):
                return bare[0]
            continue
        inside, closed = braced(text, start + 1, LONGEST_BOX)
        if closed:
            return inside.strip()
    return None
