"""Finished pieces of long work, one JSON line each, so that whoever starts it again does only what is missing."""

import json
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from microglia import store
from microglia.errors import DataError


class Ledger:
    """Values by key, kept in a file, or in memory only when `path` is None.

    settings: everything that the values depend on beside their key; a value under other settings is not taken.
    Raises DataError for a file that is something else.
    """

    def __init__(self, path: Path | str | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.path, self.settings = None if path is None else Path(path), dict(settings or {})
        self._values: dict[str, Any] = {}
        for where, row in store.read(self.path) if self.path is not None and self.path.exists() else ():
            if row.keys() != {"key", "value"}:
                raise DataError(f"{where} has no key and value, so the file is no ledger; move it away")
            self._values[json.dumps(row["key"], sort_keys=True)] = row["value"]

    def within(self, **settings: Any) -> "Ledger":
        """The same file, for values that depend on more settings."""
        narrower = copy(self)
        narrower.settings = {**self.settings, **settings}
        return narrower

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self._name(key) in self._values

    def get(self, key: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """The value under `key`, which is JSON; `work` makes it if it is missing."""
        name = self._name(key)
        if name not in self._values:
            self._values[name] = work()
            if self.path is not None:
                store.append(self.path, [{"key": json.loads(name), "value": self._values[name]}])
        return self._values[name]

    def _name(self, key: Mapping[str, Any]) -> str:
        return json.dumps({**self.settings, **key}, sort_keys=True)
