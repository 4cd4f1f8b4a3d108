"""The `microglia` command. A verb is a function in its own file and a line in VERBS."""

from typing import Annotated

import typer

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
from microglia.cli.report import report
from microglia.cli.serve import serve
from microglia.cli.train import train

VERBS = (
    demo,
    train,
    evaluate,
    calibrate,
    compare,
    ablate,
    generate,
    benchmark,
    inspect,
    export,
    serve,
    report,
)


def hyphenated(name: str) -> str:
    """`--base_model`, as the original scripts spell it, is `--base-model`."""
    return name.replace("_", "-")


app = typer.Typer(
    help="Input-adaptive attention-head pruning: every head reads the prompt, those kept write the answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": hyphenated, "help_option_names": ["-h", "--help"]},
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
