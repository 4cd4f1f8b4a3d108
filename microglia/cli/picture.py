"""One prompt's decision as a picture: both signals, what the policy said of every head, and what became of it."""

from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from microglia.cli.writing import write
from microglia.errors import MicrogliaError

FORMATS = (".png", ".svg", ".pdf")
TEAL = "#0b6e6e"
COLOURS = {"kept": TEAL, "kept to fill": "#86bdb8", "pruned": "#f1efe9", "displaced": "#e8a15a"}


def check_picture(path: Path) -> None:
    """Raise MicrogliaError unless a picture can be drawn to `path`: better known before than after."""
    if path.suffix not in FORMATS:
        raise MicrogliaError(f"{path} was given for the picture; it must end in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise MicrogliaError("a picture needs matplotlib, which is not installed; pip install 'microglia[report]'")


def draw_decision(decision: dict[str, Any], path: Path, *, title: str = "") -> Path:
    """Draw what `microglia inspect --prompt --json` prints. Sites from top to bottom, heads from left to right."""
    check_picture(path)
    from matplotlib.figure import Figure

    sites = [site for site in decision["sites"] if site["unit"] == decision["sites"][0]["unit"]]
    panels = [name for name in ("norm", "entropy") if name in sites[0]["signals"]]
    high = min(9.0, 1.4 + 0.24 * len(sites))
    figure = Figure(figsize=(3.4 * (len(panels) + 2), high + 0.9), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels) + 2, sharey=True)
    for axis, name in zip(axes, panels, strict=False):
        values = [site["signals"][name] for site in sites]
        if name == "norm":
            values = [[value / (max(row) or 1) for value in row] for row in values]
        words = {"norm": "norm, relative to the site's largest", "entropy": "attention entropy"}[name]
        figure.colorbar(_matrix(axis, values, _teal(), 0, 1), ax=axis, shrink=0.8)
        axis.set_title(words, fontsize=10)
    margin = [[logit - decision["threshold"] for logit in site["logit"]] for site in sites]
    most = max(abs(value) for row in margin for value in row) or 1.0
    figure.colorbar(_matrix(axes[-2], margin, "BrBG", -most, most), ax=axes[-2], shrink=0.8)
    axes[-2].set_title("logit above threshold", fontsize=10)
    _outcomes(axes[-1], sites)
    axes[0].set_ylabel("site")
    kept = f"{decision['keep_ratio']:.1%} of the heads kept, prompt of {decision['tokens']} tokens"
    figure.suptitle("\n".join(line for line in (_short(title), kept) if line), fontsize=11)
    image = BytesIO()
    figure.savefig(image, dpi=160, format=path.suffix[1:])
    write(path, image.getvalue(), "--png")
    return path


def _matrix(axis: Any, values: Sequence[Sequence[float]], colours: Any, low: float, high: float) -> Any:
    """Site × head; shorter rows end early."""
    wide = max(map(len, values))
    padded = [[*row, *[float("nan")] * (wide - len(row))] for row in values]
    axis.set_xlabel("head")
    axis.set_xticks(range(0, wide, 1 if wide <= 12 else 4))
    axis.set_yticks(range(0, len(values), 1 if len(values) <= 12 else 4))
    axis.set_xticks([place - 0.5 for place in range(1, wide)], minor=True)
    axis.set_yticks([place - 0.5 for place in range(1, len(values))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2 if wide <= 16 else 0.4)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return axis.imshow(padded, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _teal() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("teal", ["#f7f5f0", TEAL])


def _outcomes(axis: Any, sites: Sequence[dict[str, Any]]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(COLOURS)
    values = [[float(names.index(outcome)) for outcome in site["outcome"]] for site in sites]
    _matrix(axis, values, ListedColormap(list(COLOURS.values())), -0.5, len(names) - 0.5)
    seen = {outcome for site in sites for outcome in site["outcome"]}
    axis.set_title("decision", fontsize=10)
    handles = [Patch(facecolor=COLOURS[name], edgecolor="0.6", label=name) for name in names if name in seen]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _short(words: str, most: int = 100) -> str:
    """One line, with no dollar sign that matplotlib would take for mathematics."""
    line = " ".join(words.split()).replace("$", r"\$")
    return line if len(line) <= most else line[: most - 1] + "…"
