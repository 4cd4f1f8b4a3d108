"""Every policy on the same prompts: accuracy, loss, answer length, time and memory over keep ratios and seeds."""

from microglia.experiments.compare.controls import CONTROLS
from microglia.experiments.compare.entries import AGENTS, BASELINE, Entry, make_entries, parsed
from microglia.experiments.compare.plot import draw
from microglia.experiments.compare.run import Comparison, at_keep_ratio, compare
from microglia.experiments.compare.summary import Run, summarise

__all__ = [
    "AGENTS",
    "BASELINE",
    "CONTROLS",
    "Comparison",
    "Entry",
    "Run",
    "at_keep_ratio",
    "compare",
    "draw",
    "make_entries",
    "parsed",
    "summarise",
]
