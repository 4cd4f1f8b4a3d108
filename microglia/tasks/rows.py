"""Reading rows of examples, from JSON lines or from the hub, so that every task names file, line and field alike."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microglia.errors import DataError


def first_file(paths: Sequence[Path], advice: str) -> Path:
    """The first of `paths` that exists. Raises DataError naming the first of them; `advice` ends its sentence."""
    for path in paths:
        if path.is_file():
            return path
    raise DataError(f"there is no file {paths[0]}; {advice}")


@contextmanager
def usable_rows(where: str, fields: str) -> Iterator[None]:
    """Inside, a row whose `fields` are missing or of another type than expected raises a DataError that names them."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{where} holds a row without usable {fields} ({error!r}); download it again") from error


def read_rows(path: Path, required: tuple[str, ...], *, texts: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, each with at least the `required` fields; blank lines are skipped.

    texts: the required fields must be texts. Raises DataError naming file, line and field when they are not, or when a
    line is not an object that has them.
    """
    rows = []
    for number, line in enumerate(_read(path, errors="surrogateescape").split("\n"), 1):
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
            if texts and not isinstance(row[key], str):
                raise DataError(f"{where} has {row[key]!r} as {key!r}, which must be a text; put it in quotes")
        rows.append(row)
    return rows


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises DataError naming the file when it is not JSON."""
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from error


def _read(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that or give another file") from error


def hub_rows(repository: str, name: str | None, split: str, instead: str) -> list[dict[str, Any]]:
    """The rows of a split of a data set on the hub, configuration `name`. `instead`: what a local folder must hold.

    Raises DataError when the hub cannot be reached.
    """
    try:
        from datasets import load_dataset  # here, since importing it takes seconds and a local folder does without

        return list(load_dataset(repository, name, split=split))
    except Exception as error:  # each cause below datasets has its own type, offline and firewalls among them
        raise DataError(
            f"{repository} could not be loaded from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"go online, or give --data-dir (data_dir=) a folder with {instead}"
        ) from error


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError for one that cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); mend that or give another file") from error
