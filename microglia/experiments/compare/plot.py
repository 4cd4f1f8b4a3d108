"""Accuracy against sparsity and against the speed-up that was really measured, one line per policy."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from microglia.errors import MicrogliaError
from microglia.results import ComparisonResult, ComparisonRow

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise MicrogliaError unless a plot can be drawn to `path`: better known before than after."""
    if path.suffix not in FORMATS:
        raise MicrogliaError(f"{path} was given for the plot; it must end in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise MicrogliaError(
            "the plot needs matplotlib, which is not installed; pip install 'microglia[report]' or leave --plot out"
        )


def draw(result: ComparisonResult, path: Path | str, *, title: str = "") -> Path:
    """Write the picture of a comparison. Raises MicrogliaError without matplotlib or for another format."""
    path = Path(path)
    check_plot(path)
    from matplotlib.figure import Figure

    rows = result.rows
    panels = [("heads pruned, %", [100 * (1 - row.keep_ratio) for row in rows], "pareto_sparsity")]
    speeds = [row.request.ratio_to_dense for row in rows if row.request]
    if len(speeds) == len(rows):
        panels.append(("measured speed-up of a request, ×", speeds, "pareto_latency"))
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (label, places, front) in zip(axes, panels, strict=True):
        _panel(axis, rows, places, front)
        axis.set_xlabel(label)
    axes[0].set_ylabel("right, % (95 % interval)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 * len(panels), fontsize="small", frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _panel(axis: Any, rows: Sequence[ComparisonRow], places: Sequence[float], front: str) -> None:
    points = list(zip(rows, places, strict=True))
    dense = 100 * rows[0].accuracy
    axis.axhline(dense, color="0.6", linewidth=1, linestyle=":", label="dense")
    for number, (name, part) in enumerate(groupby(points[1:], key=lambda point: point[0].policy)):
        shown = list(part)
        x = [place for _, place in shown]
        y = [100 * row.accuracy for row, _ in shown]
        ends = [[abs(100 * row.ci95[end] - v) for (row, _), v in zip(shown, y, strict=True)] for end in (0, 1)]
        axis.errorbar(x, y, yerr=ends, marker="osD^vP*X"[number % 8], markersize=4, capsize=2, linewidth=1, label=name)
    best = [(place, 100 * row.accuracy) for row, place in points if getattr(row, front)]
    # Rings and no line: what nothing surely beats need not lie in an order.
    axis.scatter(*zip(*best, strict=True), s=70, facecolors="none", edgecolors="0.2", linewidths=0.8, label="front")
    axis.grid(alpha=0.25)
