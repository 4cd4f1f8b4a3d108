"""One bench for every policy: accuracy, loss, answer length, time and memory over keep ratios and seeds."""

from microglia.compare.contenders import Contender, contenders, parsed
from microglia.compare.plot import draw
from microglia.compare.run import Arena, at_keep_ratio, compare
from microglia.compare.summary import Cell, Timing, summarise

__all__ = [
    "Arena",
    "Cell",
    "Contender",
    "Timing",
    "at_keep_ratio",
    "compare",
    "contenders",
    "draw",
    "parsed",
    "summarise",
]
