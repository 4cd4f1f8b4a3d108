"""Reasoning tasks: one data set, one file; the registry below is all there is to know about which exist."""

from microglia.errors import ConfigError
from microglia.tasks.arithmetic import ArithmeticTask
from microglia.tasks.base import Example, Task
from microglia.tasks.gsm8k import Gsm8kTask

TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticTask,
    "gsm8k": Gsm8kTask,
}

__all__ = ["TASKS", "Example", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called `name`. Raises ConfigError naming the tasks that exist."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]()
