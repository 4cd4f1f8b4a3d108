"""Machine code by its name: compiled at first use, or read from numba's cache on disk. Nothing here imports numba."""

import functools
import hashlib
from pathlib import Path
from typing import Any

SOURCES = "attention functions memory multiply packed products quantise step streams tables".split()


@functools.cache
def sources() -> str:
    """A fingerprint of all that the code is made of: numba's cache knows a function by its own file only."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()


@functools.cache
def step() -> Any:
    """The function that every thread runs, see `microglia.execution.cpu.step`."""
    from microglia.execution.cpu.step import compiled

    return compiled(sources())


@functools.cache
def multiply(kind: int, by_columns: bool) -> int:
    """The address of the code that multiplies by matrices of a kind, in rows or in columns."""
    from microglia.execution.cpu.multiply import compiled

    return int(compiled(kind, by_columns, sources()).address)
