"""Command lines that pages and notebooks show, read as a shell would and given to the parser of the command line."""

import re
import shlex
from collections.abc import Iterator

import typer.main

from microglia.cli.main import app


def command_lines(script: str) -> Iterator[list[str]]:
    """The words after `microglia` of every call in a shell script; continued lines are one."""
    for line in script.replace("\\\n", " ").splitlines():
        if line.strip().startswith("microglia "):
            yield shlex.split(line, comments=True)[1:]


def shell_blocks(page: str) -> list[str]:
    """The contents of a page's ```bash blocks, indented ones too."""
    return re.findall(r"^ *```bash\n(.*?)^ *```", page, flags=re.MULTILINE | re.DOTALL)


def check_command(words: list[str]) -> None:
    """Raise an error that names the verb, option or value which the command line does not take."""
    group = typer.main.get_command(app)
    verb = group.commands.get(words[0])  # type: ignore[attr-defined]
    if verb is None:
        raise LookupError(f"there is no verb {words[0]}")
    if not {"--help", "-h"} & {*words}:
        parent = group.make_context("microglia", [], resilient_parsing=True)
        verb.make_context(words[0], words[1:], parent=parent)
