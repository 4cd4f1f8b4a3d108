"""Reasoning tasks: one data set, one file; the registry below is all there is to know about which exist."""

from typing import Any

from microglia.errors import ConfigError
from microglia.tasks.arc import ArcChallengeTask, ArcEasyTask
from microglia.tasks.arithmetic import ArithmeticTask
from microglia.tasks.base import Choices, Example, Task
from microglia.tasks.bbh import BbhLogicTask, BbhTask
from microglia.tasks.gsm8k import Gsm8kTask
from microglia.tasks.hendrycks_math import Math500Task, MathTask
from microglia.tasks.jsonl import JsonlTask
from microglia.tasks.svamp import SvampTask
from microglia.tasks.text import TextTask
from microglia.tasks.unlabelled import PromptsTask

TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticTask,
    "gsm8k": Gsm8kTask,
    "svamp": SvampTask,
    "math": MathTask,
    "math-500": Math500Task,
    "bbh": BbhTask,
    "bbh-logic": BbhLogicTask,
    "arc-easy": ArcEasyTask,
    "arc-challenge": ArcChallengeTask,
    "jsonl": JsonlTask,
    "text": TextTask,
    "prompts": PromptsTask,
}

__all__ = ["TASKS", "Choices", "Example", "Task", "get_task"]


def get_task(name: str | Task, **options: Any) -> Task:
    """The task called `name` (a task itself is handed back), with its options: shots, and those of `jsonl`.

    Raises ConfigError naming the tasks that exist or the options that this one has.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    kind = TASKS[name]
    if unknown := sorted(options.keys() - {*kind.options}):
        raise ConfigError(f"task {name} has no option {', '.join(unknown)}; it has {', '.join(kind.options)}")
    return kind(**options)
