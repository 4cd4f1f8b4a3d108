"""GSM8K: grade-school mathematics word problems with worked answers (Cobbe et al. 2021, arXiv:2110.14168).

The data have no validation split; ours is carved out of train by a fixed shuffle, and our train goes without it.
"""

import re
from pathlib import Path
from typing import ClassVar

from microglia.errors import DataError
from microglia.tasks.answers import normalise_answer
from microglia.tasks.base import BOXED, Example, Task, split_off
from microglia.tasks.rows import first_file, hub_rows, read_rows

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"
ADVICE = (
    "data_dir must be a folder with train.jsonl and test.jsonl as in github.com/openai/grade-school-math, so give such "
    "a folder or leave it out to use the hub"
)
CALCULATOR = re.compile(r"<<[^>]*>>")


class Gsm8kTask(Task):
    """7,473 problems to train on (500 of them held out as validation) and 1,319 to test on."""

    name: ClassVar[str] = "gsm8k"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    instruction: ClassVar[str] = BOXED

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The examples of a split, from `data_dir` (a folder with train.jsonl and test.jsonl) or from the hub.

        The calculator annotations `<<2*3=6>>` are taken out of the answers: nobody wants to read or decode them.
        Raises DataError when files or fields are missing, an answer does not end in `#### number`, or the hub cannot be
        reached.
        """
        source = "test" if split == "test" else "train"
        if data_dir is None:
            rows = hub_rows(HUB_ID, HUB_CONFIG, source, "train.jsonl and test.jsonl")
        else:
            path = first_file([Path(data_dir) / f"{source}.jsonl"], ADVICE)
            rows = read_rows(path, ("question", "answer"))
            if len(rows) < 2:
                raise DataError(f"{path} holds {len(rows)} example(s) but at least 2 are needed; give the whole file")
        return split_off([_example(row, source, index) for index, row in enumerate(rows)], split)


def _example(row: dict[str, str], source: str, index: int) -> Example:
    """`source` and `index` (the row in the file) make the id, so that it is the same in every run."""
    answer = CALCULATOR.sub("", row["answer"]).strip()
    worked, marker, final = answer.rpartition("####")
    gold = normalise_answer(final)
    if not marker or not re.search(r"\d", gold):
        raise DataError(
            f"example {index} of GSM8K {source} ends in {answer[-40:]!r}; it must end in '#### number', so mend it"
        )
    steps = sum(1 for line in worked.splitlines() if line.strip())
    return Example(f"gsm8k/{source}/{index}", row["question"].strip(), answer, gold, difficulty=steps)
