"""Input-adaptive pruning: the prompt is read with every attention head, the answer written with those kept.

Importing this package imports nothing else; each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microglia.anatomy import Anatomy as Anatomy
    from microglia.anatomy import HeadGeometry as HeadGeometry
    from microglia.attach import attached as attached
    from microglia.errors import MicrogliaError as MicrogliaError
    from microglia.generation import generate as generate
    from microglia.pruner import Budget as Budget
    from microglia.pruner import Pruner as Pruner
    from microglia.system import MicrogliaPruningSystem as MicrogliaPruningSystem
    from microglia.units import find_sites as find_sites

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "microglia.anatomy",
    "Budget": "microglia.pruner",
    "HeadGeometry": "microglia.anatomy",
    "MicrogliaError": "microglia.errors",
    "MicrogliaPruningSystem": "microglia.system",
    "Pruner": "microglia.pruner",
    "attached": "microglia.attach",
    "find_sites": "microglia.units",
    "generate": "microglia.generation",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
