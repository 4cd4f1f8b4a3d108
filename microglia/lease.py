"""The lock on a model: one attachment at a time, and none beside dense answers, which it would prune."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from microglia.errors import MicrogliaError

_USES: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()  # dense answers now; -1: attached
_GUARD = threading.Lock()


def attached_alone(lm: nn.Module) -> AbstractContextManager[None]:
    """While inside, nobody else can attach the model or be promised a dense answer."""
    return _held(lm, alone=True)


def dense(lm: nn.Module) -> AbstractContextManager[None]:
    """While inside, nobody can attach the model: what is written meanwhile is written with every unit."""
    return _held(lm, alone=False)


@contextmanager
def _held(lm: nn.Module, *, alone: bool) -> Iterator[None]:
    with _GUARD:
        uses = _USES.get(lm, 0)
        if uses < 0 or (alone and uses):
            state = "already attached" if uses < 0 else "writing a dense answer"
            raise MicrogliaError(
                f"this {type(lm).__name__} is {state}, here or in another thread; leave that context first or "
                "use a second copy of the model"
            )
        _USES[lm] = -1 if alone else uses + 1
    try:
        yield
    finally:
        with _GUARD:
            _USES[lm] = 0 if alone else _USES[lm] - 1
