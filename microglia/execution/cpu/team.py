"""Threads that do one thing together: as many as torch has, waiting without turning between steps.

Neither numba's threads nor torch's: those of OpenMP and TBB may be fewer than asked for, and a step whose threads wait
for each other would then wait forever; and what turns in vain between two steps takes a core from torch.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch


class Team:
    """Threads of this process; one task at a time. `threads` counts the one that calls."""

    def __init__(self) -> None:
        self.tasks: list[SimpleQueue[Callable[[], None]]] = []
        self.turn, self.process = threading.Lock(), os.getpid()

    def run(self, task: Callable[[int], Any], threads: int) -> Any:
        """task(0), task(1), … at once; returns what task(0) does. The tasks release the GIL, or nothing is at once."""
        with self.turn:
            if self.process != os.getpid():  # a fork has no threads
                self.tasks, self.process = [], os.getpid()
            while len(self.tasks) < threads - 1:
                self.tasks.append(SimpleQueue())
                threading.Thread(target=_work, args=(self.tasks[-1],), daemon=True, name="microglia").start()
            done: SimpleQueue[BaseException | None] = SimpleQueue()
            for index, tasks in enumerate(self.tasks[: threads - 1]):
                tasks.put(_reporting(task, index + 1, done))
            result = task(0)
            for error in [done.get() for _ in range(threads - 1)]:
                if error is not None:
                    raise error
            return result


def _reporting(task: Callable[[int], Any], index: int, done: SimpleQueue[BaseException | None]) -> Callable[[], None]:
    def work() -> None:
        try:
            task(index)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)

    return work


def _work(tasks: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        tasks.get()()


TEAM = Team()


def thread_count() -> int:
    """Threads of a step: as many as torch has."""
    return torch.get_num_threads()
