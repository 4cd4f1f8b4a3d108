"""One append-only file of JSON objects, a line each, for records and for finished pieces of long work.

A run that is killed while it writes leaves a line that is cut short. Reading passes over such a line, and the next
write starts a new one, so that neither the lines before nor those after are lost.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from microglia.errors import DataError


def append(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, all of them or none; they are on the disk when this returns. Missing folders are made.

    Everything is encoded before the file is touched. Raises DataError for a row that JSON cannot hold (NaN and infinity
    are not JSON), and when the file cannot be written.
    """
    path = Path(path)
    block = b"".join(_encode(row) for row in rows)
    if not block:
        return
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size and _last_byte(file) != b"\n":
                block = b"\n" + block
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise DataError(f"{path} cannot be written ({error.strerror}); make room or give another file") from error


def read(path: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """Every row in order, with the file and line that an error names; blank lines and lines cut short are left out.

    A line cut short begins as an object does. Raises DataError for a line that does not, and for a missing file.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSON-lines file of microglia") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(b"{"):
            raise DataError(f"{path}, line {number} is not a JSON object; mend or delete that line")
        with suppress(ValueError, RecursionError):  # cut short, also in the middle of a character
            rows.append((f"{path}, line {number}", json.loads(line)))
    return rows


def _encode(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"the row that begins with {next(iter(row.values()))!r:.60} cannot be written as JSON ({error}); rows hold "
            "finite numbers, texts, lists and dicts, so convert or leave out the rest"
        ) from error


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last
