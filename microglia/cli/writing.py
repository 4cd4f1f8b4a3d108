"""What verbs leave on the disk: records of single numbers, and files that are written whole or not at all."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from microglia.errors import MicrogliaError


def measured_on(model: Any) -> Any:
    """The Circumstances of what was measured now on this model."""
    from microglia.record import circumstances
    from microglia.results import Circumstances

    return Circumstances(**circumstances(next(model.parameters()).device))


def recorder(made: Any, seed: int, shared: Mapping[str, Any], unit: str = "ratio") -> Callable[..., Any]:
    """Makes records, of shares as a rule: `record(name, value, n, **extra)`; all of them say what is shared."""
    from microglia.record import Record

    def record(name: str, value: float, n: int, **extra: Any) -> Record:
        return Record(name, value, unit, n=n, seed=seed, extra={**shared, **extra}, **vars(made))

    return record


def write(path: Path, data: bytes, instead: str = "--output-dir") -> None:
    """Write a file. Raises MicrogliaError, which says which option to change, where that is not possible."""
    from microglia.checkpoint import write_atomically

    try:
        write_atomically(path, data)
    except OSError as error:
        raise MicrogliaError(f"{path} cannot be written ({error.strerror}); give another {instead}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a result for people and programs."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def write_run(summary: Path, result: Any, records: Iterable[Any]) -> None:
    """A result, and beside it its records in place of those of an earlier run."""
    from microglia.record import append_records

    file = summary.with_name("records.jsonl")
    file.unlink(missing_ok=True)
    append_records(file, records)
    write_json(summary, result.to_json())
