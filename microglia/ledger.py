"""Finished pieces of long work, one JSON line each, so that whoever starts it again does only what is missing."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microglia.errors import DataError


class Ledger:
    """Values by key, kept in a file, or in memory only when `path` is None.

    about: everything that the values depend on beside their own key; a value found under another `about` is not taken.
    A line that a crash cut short is done again. Raises DataError for a file that is something else.
    """

    def __init__(self, path: Path | str | None = None, about: Mapping[str, Any] | None = None) -> None:
        self.path, self.about = None if path is None else Path(path), dict(about or {})
        self._values = {} if self.path is None else _read(self.path)

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self._name(key) in self._values

    def get(self, key: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """The value under `key`, which is JSON; `work` makes it if it is missing."""
        name = self._name(key)
        if name not in self._values:
            value = work()
            self._values[name] = value
            if self.path is not None:
                _append(self.path, json.dumps({"key": json.loads(name), "value": value}, ensure_ascii=False))
        return self._values[name]

    def _name(self, key: Mapping[str, Any]) -> str:
        return json.dumps({**self.about, **key}, sort_keys=True)


def _append(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            start = b"\n" if file.tell() else b""  # before, not after: a line that was cut short then stands alone
            file.write(start + line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); make room and start again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    values = {}
    for line in filter(None, lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short
        if not isinstance(row, dict) or row.keys() != {"key", "value"}:
            raise DataError(f"{path} holds a line without key and value, so it is no ledger; move that file away")
        values[json.dumps(row["key"], sort_keys=True)] = row["value"]
    return values
