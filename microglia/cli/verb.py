"""What all verbs share: results on stdout (one JSON object with --json), all else on stderr, sentences for errors."""

import functools
import inspect
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from microglia.cli.bundles import command_line
from microglia.cli.settings import Config
from microglia.errors import ConfigError, MicrogliaError

WRONG, INTERRUPTED = 2, 130  # exit codes; 2 is also what typer uses for wrong options
BETWEEN_LINES = 60  # seconds between two lines of progress in a log
GO_ON = "go on with the same command"  # the end of sentences about interruptions
SHARED = {"train", "evaluate"}  # the verbs that several processes do together
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks and warnings.")]
COMMON = {"config": (Config, None), "as_json": (AsJson, False), "verbose": (Verbose, False)}
NOT_SETTINGS = {"config", "help_all"}


@dataclass(frozen=True)
class Outcome:
    """What a verb found: `data` for programs, `view` for people (put on stdout one below the other)."""

    data: dict[str, Any]
    view: Sequence[RenderableType] = field(default_factory=tuple)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence that says what was kept and how to go on."""


def verb(*, shown: Sequence[str] | None = None) -> Callable[[Callable[..., Outcome]], Callable[..., None]]:
    """Make a typer command of a function that returns an Outcome; adds --config, --json and --verbose.

    shown: where a verb has many options, those that --help shows; --help-all shows all of them.
    """

    def decorate(function: Callable[..., Outcome]) -> Callable[..., None]:
        bundles, parameters = command_line(function, COMMON, shown)
        takes_settings = "settings" in inspect.signature(function).parameters

        @functools.wraps(function)
        def command(*, as_json: bool, verbose: bool, **options: Any) -> None:
            def outcome() -> Outcome:
                if several() and function.__name__ not in SHARED:
                    raise ConfigError(f"{function.__name__} works in one process; start it without torchrun")
                given = {name: value for name, value in options.items() if name not in NOT_SETTINGS}
                settings = {"settings": dict(given)} if takes_settings else {}
                values = {name: bundle.take(given) for name, bundle in bundles.items()}
                return function(**given, **values, **settings)

            run(outcome, as_json, verbose)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def run(call: Callable[[], Outcome], as_json: bool, verbose: bool) -> None:
    """Show what `call` returns; its errors are sentences on stderr."""
    try:
        with redirect_stdout(sys.stderr), quiet(verbose):
            outcome = call()
    except MicrogliaError as error:
        if verbose:
            raise
        tell(f"microglia: {error}")
        raise typer.Exit(WRONG) from None
    except KeyboardInterrupt as stop:
        tell(f"microglia: {str(stop) or 'interrupted; nothing was written'}")
        raise typer.Exit(INTERRUPTED) from None
    if several():
        from microglia import processes

        first = processes.is_first()
        processes.leave()
        if not first:
            return
    if as_json:
        sys.stdout.write(json.dumps(finite(outcome.data), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        for part in outcome.view:
            Console(file=sys.stdout).print(part)


def several() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell(sentence: str) -> None:
    """One line on stderr, unwrapped and as it is."""
    sys.stderr.write(sentence + "\n")


@contextmanager
def progress(description: str, interrupted: str | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per name on stderr, or a line a minute where that is no terminal; yields `update(name, done, all)`

    interrupted: what Ctrl-C inside says was kept, and how to go on.
    """
    from rich.progress import Progress

    said = time.monotonic()
    silent = os.environ.get("RANK", "0") != "0"
    with Progress(console=Console(file=sys.stderr), transient=True, disable=silent) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            nonlocal said
            if name not in tasks:
                tasks[name] = bars.add_task(f"{description}: {name}", total=total)
            bars.update(tasks[name], completed=done)
            if not (silent or bars.console.is_terminal) and time.monotonic() - said >= BETWEEN_LINES:
                left, said = bars.tasks[tasks[name]].time_remaining, time.monotonic()
                estimate = "" if left is None else f", about {max(1, round(left / 60))} min left"
                tell(f"{description}: {name}, {done} of {total}{estimate}")

        try:
            yield update
        except KeyboardInterrupt:
            if interrupted is None:
                raise
            raise Interrupted(f"interrupted; {interrupted}") from None


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """While inside, the libraries underneath say nothing below an error and draw no bars of their own."""
    if verbose:
        yield
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # before the first import of torch, which logs
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            transformers_logging.enable_progress_bar()


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for what is undefined."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
