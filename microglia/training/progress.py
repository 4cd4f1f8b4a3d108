"""A progress bar on stderr that shows what matters: task loss, keep ratio, and what steers it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from microglia import processes

SHOWN = {
    "task": "task",
    "kl": "KL",
    "keep_ratio": "keep",
    "byte_share": "bytes",
    "alpha": "α",
    "multiplier": "λ",
    "eval_loss": "validation",
}


@contextmanager
def bar(description: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an estimate on stderr; yields `update(done, total)`. It appears with the first update."""
    with ExitStack() as stack:
        shown: list[Any] = []

        def update(done: int, total: int) -> None:
            if not shown and not quiet and processes.is_first():
                shown.append(stack.enter_context(tqdm(total=total, desc=description, leave=False)))
            for one in shown:
                one.update(done - one.n)

        yield update


class Report(TrainerCallback):
    """transformers' own callbacks print to stdout, which belongs to results; this one does not."""

    def __init__(self, listener: Callable[[dict[str, Any]], None] | None, *, show: bool) -> None:
        self.listener, self.show = listener, show
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", disable=not self.show, leave=False
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        values = {label: f"{logs[name]:.3f}" for name, label in SHOWN.items() if logs and name in logs}
        if self.listener and logs:
            self.listener({"step": state.global_step, **logs})
        if values and self.bar is not None:
            self.bar.set_postfix(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
