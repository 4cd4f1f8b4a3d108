"""Another value for an attribute of a module, until a stack closes."""

from contextlib import ExitStack
from typing import Any


def swap(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes; what the object itself did not have is taken away again."""
    present = any(
        name in held for held in (vars(owner), *(vars(owner).get(kind, {}) for kind in ("_modules", "_buffers")))
    )
    stack.callback(setattr, owner, name, getattr(owner, name)) if present else stack.callback(delattr, owner, name)
    setattr(owner, name, value)
