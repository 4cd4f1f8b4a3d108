"""BIG-Bench Hard: 27 tasks that need several steps of reasoning (Suzgun et al. 2022, arXiv:2210.09261).

The authors' own prompts (three worked examples a task) are the shots. They are in their repository and not on the hub.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from microglia.errors import ConfigError, DataError
from microglia.tasks.answers import NUMBER, UNICODE, extract_answer, normalise_answer, reply, stated, without_negated
from microglia.tasks.base import Example, Task
from microglia.tasks.rows import first_file, hub_rows, read_json, usable_rows

HUB_ID = "SaylorTwift/bbh"
REPOSITORY = "github.com/suzgunmirac/BIG-Bench-Hard"
LOGIC = (  # tasks whose answers follow from what they state, by logic alone
    "boolean_expressions",
    "formal_fallacies",
    "logical_deduction_three_objects",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "web_of_lies",
)
TASKS_27 = tuple(
    sorted(
        (
            *LOGIC,
            *"causal_judgement date_understanding disambiguation_qa dyck_languages geometric_shapes hyperbaton".split(),
            *"movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table".split(),
            *"reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks".split(),
            *"sports_understanding temporal_sequences tracking_shuffled_objects_three_objects".split(),
            *"tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects word_sorting".split(),
        )
    )
)
INSTRUCTION = 'Think step by step and end with "So the answer is" and the answer.'
OPTION = re.compile(r"\(([A-Z])\)|^\W*(?:(?i:option|choice)\W+)?([A-Z])(?:[.):,]|\W*$)")


class BbhTask(Task):
    """6,511 questions of 27 tasks; `family` is the task. There is nothing to train on."""

    name: ClassVar[str] = "bbh"
    splits: ClassVar[tuple[str, ...]] = ("test",)
    tasks: ClassVar[tuple[str, ...]] = TASKS_27

    def read(self, split: str, data_dir: Path | str | None) -> list[Example]:
        """The questions, from `data_dir` (a copy of the authors' repository) or from the hub.

        Raises DataError when files or fields are missing or the hub cannot be reached.
        """
        examples = []
        for task in self.tasks:
            with usable_rows(f"BBH {task}", "input and target"):
                for index, row in enumerate(_rows(task, data_dir)):
                    examples.append(_example(task, f"{index}", row["input"], row["target"]))
        return examples if self.shots else [replace(e, question=f"{e.question}\n{INSTRUCTION}") for e in examples]

    def with_shots(self, examples: Sequence[Example], data_dir: Path | str | None) -> list[Example]:
        """Each example with the first of its own task's worked ones before it.

        Raises ConfigError when there is no folder that could hold them or more are asked for than there are.
        """
        if not self.shots:
            return list(examples)
        if data_dir is None:
            raise ConfigError(
                f"BBH's worked examples are not on the hub; clone {REPOSITORY} and give its folder as --data-dir "
                "(data_dir=), or leave shots out"
            )
        solved = {task: _worked(task, Path(data_dir)) for task in self.tasks}
        if self.shots > (most := min(map(len, solved.values()))):
            raise ConfigError(f"{self.shots} shots were asked for, but BBH has {most} a task; ask for fewer")
        return [replace(example, shots=solved[example.family][: self.shots]) for example in examples]

    def extract(self, text: str) -> str | None:
        """What follows the last "the answer is", or else the last line."""
        text = reply(text)
        lines = [line for line in text.splitlines() if line.strip()]
        return _stripped((stated(text) or lines)[-1]) if lines else None

    def correct(self, example: Example, text: str) -> bool:
        """Whether the answers agree as options, numbers, brackets or words, whichever the gold answer is."""
        answer, gold = self.extract(text), _stripped(example.gold)
        if answer is None:
            return False
        if option := re.fullmatch(r"\(([A-Z])\)", gold):
            letter = OPTION.search(without_negated(answer))
            return letter is not None and option[1] in (letter[1], letter[2])
        if NUMBER.fullmatch(gold):
            return extract_answer(f"The answer is {answer}") == normalise_answer(gold)
        if not re.search(r"\w", gold):
            return re.sub(r"[^\[\](){}<>]", "", answer) == gold.replace(" ", "")
        answer_words, words = (re.findall(r"[\w'-]+", side.casefold()) for side in (answer, gold))
        return answer_words[: len(words)] == words if len(words) == 1 else answer_words == words


class BbhLogicTask(BbhTask):
    """The 1,500 questions of the six tasks of pure logic."""

    name: ClassVar[str] = "bbh-logic"
    tasks: ClassVar[tuple[str, ...]] = LOGIC


def _stripped(answer: str) -> str:
    """The answer without quotes, emphasis and a full stop around it."""
    answer = answer.translate(UNICODE)
    boxed = re.search(r"\\boxed\{(?:\\text\{)?([^{}]*)\}", answer)
    text = (boxed[1] if boxed else answer).strip().strip("*_`\"'$").strip()
    return text.removesuffix(".").strip().strip("*_`\"'$").strip()


def _rows(task: str, data_dir: Path | str | None) -> list[dict[str, Any]]:
    if data_dir is None:
        return hub_rows(HUB_ID, task, "test", f"bbh/{task}.json")
    advice = f"data_dir must be a copy of {REPOSITORY}, so give one or leave it out to use the hub"
    return list(read_json(first_file([Path(data_dir) / "bbh" / f"{task}.json"], advice))["examples"])


def _worked(task: str, folder: Path) -> tuple[Example, ...]:
    """The worked examples of the authors' prompt file: description, then `Q: …` and `A: …` with blank lines between.

    The description opens the first question.
    """
    path = first_file([folder / "cot-prompts" / f"{task}.txt"], f"give a whole copy of {REPOSITORY}")
    text = path.read_text(encoding="utf-8").partition("-----\n")[2]
    description, *rest = re.split(r"^Q:", text, flags=re.M)
    parts = [part.partition("\nA:") for part in rest]
    if not parts or not all(answer.strip() for _, _, answer in parts):
        raise DataError(f"{path} holds no questions 'Q:' with answers 'A:'; download it again")
    examples = []
    for number, (question, _, answer) in enumerate(parts):
        text = f"{description.strip()}\n\n{question.strip()}" if number == 0 else question.strip()
        examples.append(_example(task, f"shot-{number}", text, (stated(answer) or [""])[-1], answer.strip()))
    return tuple(examples)


def _example(task: str, name: str, question: str, target: str, answer: str | None = None) -> Example:
    target = target.strip()
    worked = f"So the answer is {target}." if answer is None else answer
    return Example(f"bbh/{task}/{name}", question.strip(), worked, _stripped(target), difficulty=0, family=task)
