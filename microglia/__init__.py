"""Input-adaptive attention-head pruning: the prompt is read with every head, the answer written with those kept.

Importing this package imports nothing else; each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microglia.agent import MicrogliaAgent as MicrogliaAgent
    from microglia.attach import attached as attached
    from microglia.compact import compacted as compacted
    from microglia.errors import MicrogliaError as MicrogliaError
    from microglia.generation import generate as generate
    from microglia.geometry import HeadGeometry as HeadGeometry
    from microglia.sites import find_sites as find_sites
    from microglia.system import MicrogliaPruningSystem as MicrogliaPruningSystem

__version__ = "0.1.0"

_HOMES = {
    "HeadGeometry": "microglia.geometry",
    "MicrogliaAgent": "microglia.agent",
    "MicrogliaError": "microglia.errors",
    "MicrogliaPruningSystem": "microglia.system",
    "attached": "microglia.attach",
    "compacted": "microglia.compact",
    "find_sites": "microglia.sites",
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
