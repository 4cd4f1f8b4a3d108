"""Reading a JSON-lines file of examples, so that every task names file, line and field in the same way."""

import json
from pathlib import Path

from microglia.errors import DataError


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a JSON-lines file, each with at least the `required` text fields; blank lines are skipped.

    Raises DataError naming file, line and field when a line is not an object that has them.
    """
    rows = []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                line.encode("utf-8")
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
                raise DataError(f"{where} is not JSON ({error}); mend or delete that line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} holds a {type(row).__name__}; write an object with {', '.join(required)}")
            for key in required:
                if key not in row:
                    raise DataError(f"{where} has no field {key!r}; every line needs {', '.join(required)}, so add it")
                if not isinstance(row[key], str):
                    raise DataError(f"{where} has {row[key]!r} as {key!r}, which must be a text; put it in quotes")
            rows.append(row)
    return rows
