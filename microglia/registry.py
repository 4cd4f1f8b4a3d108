"""Names for what can be chosen: one dictionary per kind of thing, which says in one sentence what there is."""

from collections.abc import Callable
from typing import TypeVar

from microglia.errors import ConfigError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Things by name. `registry["unknown"]` raises ConfigError: what was given, and what there is to choose from.

    option: what the name is called where a user gives it, `policy` say.
    """

    def __init__(self, option: str, entries: dict[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.option = option

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters a class or function under a name."""

        def enter(thing: T) -> T:
            self[name] = thing
            return thing

        return enter

    def __missing__(self, name: object) -> T:
        raise ConfigError(f"{self.option}={name!r} is unknown; choose {listed(self)}")


def listed(names: "Registry[T] | tuple[str, ...] | list[str]") -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else str(last)
