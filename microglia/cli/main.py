"""The `microglia` command. A verb is a function in its own file and a line in VERBS."""

import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from microglia import __version__
from microglia.cli.ablate import ablate
from microglia.cli.benchmark import benchmark
from microglia.cli.calibrate import calibrate
from microglia.cli.compare import compare
from microglia.cli.demo import demo
from microglia.cli.evaluate import evaluate
from microglia.cli.export import export
from microglia.cli.generate import generate
from microglia.cli.inspection import inspect
from microglia.cli.models import models
from microglia.cli.report import report
from microglia.cli.serve import serve
from microglia.cli.settings import present_name
from microglia.cli.train import train
from microglia.cli.verb import WRONG, tell

VERBS = (demo, train, evaluate, calibrate, compare, ablate, generate, benchmark, inspect, models, export, serve, report)


class OneSentence(TyperGroup):
    """Wrong options end in one sentence, as all wrong requests do."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """The exit code, or the exit itself in standalone mode, as in typer."""
        standalone = extra.pop("standalone_mode", True)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer's errors have no public class in common
                raise
            words = " ".join(error.format_message().split())
            tell("microglia: " + re.sub(r"Value error, | \(env var: 'None'\)", "", words))  # of some versions of typer
            code = WRONG
        if standalone:
            sys.exit(code)
        return code


app = typer.Typer(
    help="Input-adaptive attention-head pruning: every head reads the prompt, those kept write the answer.",
    cls=OneSentence,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": present_name, "help_option_names": ["-h", "--help"]},
)
for command in VERBS:
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"microglia {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Global options."""
