"""The errors that microglia raises on purpose.

Every message is one sentence that says what was given, what is allowed and what to do. Whoever wants to catch all of
them catches `MicrogliaError`; anything else that escapes is a bug of ours.
"""

from collections.abc import Collection
from typing import Any


class MicrogliaError(Exception):
    """Parent of every error that microglia raises on purpose."""


class UnsupportedModelError(MicrogliaError):
    """The model has a shape, a family or an option (softcap, say) that heads cannot be pruned in yet."""


class CheckpointError(MicrogliaError):
    """A saved checkpoint is missing, damaged or belongs to another model."""


class ConfigError(MicrogliaError, ValueError):
    """An argument or option has a value that is not allowed. Also a ValueError, as Python's callers expect."""


class DataError(MicrogliaError):
    """Examples, records or measurements are missing, malformed or too few for what was asked of them."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough to stand inside a sentence; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_choice(name: str, value: Any, options: Collection[str]) -> None:
    """Raise ConfigError unless the option called `name` has one of the `options` as its value."""
    if value not in options:
        listed = " or ".join(options) if len(options) == 2 else f"one of {', '.join(options)}"
        raise ConfigError(f"{name}={value!r} is unknown; choose {listed}")


def check_range(name: str, value: float, least: float, most: float, otherwise: str = "") -> None:
    """Raise ConfigError unless the option called `name` has a value between `least` and `most`.

    otherwise: what else is allowed, for the end of the sentence.
    """
    if not least <= value <= most:
        bound = f"least {least}" if value < least else f"most {most}"
        raise ConfigError(f"{name}={value} was given; it must be at {bound}{otherwise}")
