"""The base of all results, and their JSON."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from microglia.errors import DataError

KINDS: dict[str, type["Result"]] = {}


class Result:
    """A figure of a verb. `result["accuracy"]` is `result.accuracy`."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"kind": self.kind, "version": self.version, **plain(self)}


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON has them; what JSON has no number for is None."""
    if is_dataclass(value):
        pairs = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: plain(x) for f, x in pairs if x != _default(f)}
    if isinstance(value, Mapping):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(row: Any, where: str = "the result") -> Any:
    """The result that `to_json` wrote. `where` names it in an error.

    Raises DataError, one sentence, for what has no kind or an unknown one, was written by a newer version, or lacks a
    field.
    """
    again = "write it again with this version of microglia"
    if not isinstance(row, dict) or "kind" not in row:
        raise DataError(f"{where} does not say what kind of result it is; {again}")
    kind, version = row["kind"], row.get("version")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{where} is of the unknown kind {kind!r}; known are {', '.join(KINDS)}, so update microglia")
    newest = KINDS[kind].version
    if not isinstance(version, int) or version > newest:
        raise DataError(
            f"{where} has version {version!r} of the kind {kind!r}, and this microglia reads up to {newest}; update it"
        )
    try:
        return part_from_json(
            KINDS[kind], {name: x for name, x in row.items() if name not in ("kind", "version")}, kind
        )
    except DataError as error:
        raise DataError(f"{where}: {error}; {again}") from None


def _default(f: Any) -> Any:
    """The default of a field; MISSING, which equals nothing, where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def part_from_json(cls: type, row: Any, where: str) -> Any:
    """A dataclass as `plain` wrote it. Raises DataError for a field too few or too many, or of another type."""
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}")
    hints = _hints(cls)
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    for names, what in ((needed - row.keys(), "has no"), (row.keys() - hints.keys(), "has the unknown field")):
        if names:
            raise DataError(f"{where} {what} {', '.join(sorted(map(str, names)))}")
    return cls(**{name: _typed(hints[name], x, f"{where}.{name}") for name, x in row.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` of JSON as the type that a field was declared with."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else _typed(arguments[0], value, where)
    if is_dataclass(hint):
        return part_from_json(hint, value, where)  # type: ignore[arg-type]
    if hint is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin is dict and isinstance(value, dict):
        return {name: _typed(arguments[1], x, f"{where}.{name}") for name, x in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        several = origin is list or arguments[-1] is ...
        if several or len(value) == len(arguments):
            kinds = arguments[:1] * len(value) if several else arguments
            return origin(_typed(h, x, f"{where}[{i}]") for i, (h, x) in enumerate(zip(kinds, value, strict=True)))
    raise DataError(f"{where} holds {value!r:.40}")
