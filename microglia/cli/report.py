"""`microglia report`: one self-contained page from what runs left behind."""

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.show import facts
from microglia.cli.verb import Outcome, verb


@verb()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that microglia wrote, or files of records.")],
    *,
    output: Annotated[Path, "Page to write."] = Path("report.html"),
    title: Annotated[str | None, "Title of the page.", "What the microglia kept"] = None,
) -> Outcome:
    """Write one HTML page from the records of runs. Needs no network.

    microglia report runs/demo --output report.html

    microglia report checkpoints results/gsm8k results/cpu.jsonl
    """
    from microglia.report import write_report

    result = write_report(runs, output, **({} if title is None else {"title": title}))
    return Outcome(result.to_json(), [facts({"page": output, "shows": ", ".join(result.sections)})])
