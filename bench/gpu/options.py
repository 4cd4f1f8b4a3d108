"""The command line of the benchmark."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microglia.execution.captured.captured import ONE_ROW
from microglia.models import REASONER, reasoner_path

# Ways of captured steps: compile:attention:block, see microglia.execution.Captured; compile is `none` or a mode of
# torch.compile. `auto` tries at every level what may be the fastest there.
WAYS = ("default:auto:4", f"{ONE_ROW}:auto:4")
SMOKE_WAYS = ("default:kernel:4", *WAYS)  # `auto` passes over a kernel that fails; by itself it says why
TINY_WAYS = ("none:auto:1", "none:kernel:1")
BUDGET, SMOKE_BUDGET = 420.0, 75.0  # seconds


@dataclass(frozen=True)
class Options:
    """What one run is asked for.

    budget: seconds from its beginning, after which nothing goes on. output: where records are appended; known: the
    records of a run that is continued. only, skip: names of cells. ways: of captured steps, see WAYS. weights: name of
    a cell → folder of a model. layers: the first so many of every model, None for all. steps: decode steps in one
    measurement, rounds: measurements of each variant. cap: the most seconds of any cell, None for its own.
    """

    budget: float = BUDGET
    output: Path | None = None
    known: Path | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    ways: tuple[str, ...] = WAYS
    weights: dict[str, Path] = field(default_factory=dict)
    layers: int | None = None
    steps: int = 16
    rounds: int = 4
    cap: float | None = None
    smoke: bool = False
    tiny: bool = False


def options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line, by default of this process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, help=f"seconds of the whole, {BUDGET:.0f} unless this is given")
    parser.add_argument("--output", type=Path, help="file of records to append to")
    parser.add_argument("--resume", type=Path, help="file of records to go on from, and to append to without --output")
    parser.add_argument("--only", type=_names, default=(), help="names of cells, joined by commas")
    parser.add_argument("--skip", type=_names, default=(), help="names of cells to leave out")
    parser.add_argument("--ways", type=_names, help=f"ways of captured steps, {','.join(WAYS)} unless this is given")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FOLDER", type=_weights,
        help="a model with its own weights, as smollm2=FOLDER; a folder with a config.json alone gets random ones",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="only so many layers of every model")
    parser.add_argument("--steps", type=int, help="decode steps in one measurement")
    parser.add_argument("--rounds", type=int, help="measurements of each variant, taking turns")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--smoke", action="store_true", help="two layers of every kind of cell, in a minute, on a GPU")
    kind.add_argument("--tiny", action="store_true", help="two tiny layers of everything, on a CPU")
    given = parser.parse_args(arguments)
    chosen = {k: v for k, v in vars(given).items() if v not in (None, ()) and k not in ("resume", "weights")}
    weights = dict(given.weights)
    if given.tiny:
        weights = weights or {REASONER: reasoner_path()}
    output = given.output or given.resume
    return Options(**_defaults(given) | chosen | {"output": output, "known": given.resume, "weights": weights})


def _defaults(given: argparse.Namespace) -> dict[str, Any]:
    """What --smoke and --tiny mean, where nothing else is said."""
    if given.tiny:
        return {"layers": 2, "steps": 2, "rounds": 1, "ways": TINY_WAYS}
    if given.smoke:
        return {"budget": SMOKE_BUDGET, "layers": 2, "steps": 4, "rounds": 1, "cap": 20.0, "ways": SMOKE_WAYS}
    return {}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _weights(text: str) -> tuple[str, Path]:
    name, is_pair, folder = text.partition("=")
    if not is_pair or not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} was given; give NAME=FOLDER, a folder that holds a config.json")
    return name, Path(folder)
