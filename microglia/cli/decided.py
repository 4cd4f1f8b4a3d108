"""How `microglia inspect --prompt` shows a decision: a row of units per site, or a site unit by unit."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from rich.text import Text

from microglia.cli.show import share, table

SIGNS = {
    "kept": ("█", "bold green"),
    "kept to fill": ("▒", "green"),
    "pruned": ("·", "dim"),
    "displaced": ("○", "yellow"),
}
MEANINGS = {
    "kept to fill": "kept, not requested: counts are rounded up",
    "displaced": "requested, but better ones fill its group, or its sublayer is gone",
}


def overview(decision: dict[str, Any]) -> list[Any]:
    """Every site in a row: its units, how many are kept, and the mean signals of those kept and those pruned."""
    sites, views = decision["sites"], []
    for unit, kind in groupby(enumerate(sites), key=lambda pair: pair[1]["unit"]):
        rows, numbered = [], list(kind)
        for number, site in numbered:
            means = [_kept_and_pruned(values, site["keep"]) for values in site["signals"].values()]
            rows.append(
                [str(number), row_of_units(site["outcome"]), f"{sum(site['keep'])}/{len(site['keep'])}", *means]
            )
        columns = ("site", f"{unit}s", "kept", *(f"{name}: kept, pruned" for name in numbered[0][1]["signals"]))
        view = table(None, columns, rows, padding=(0, 1))
        view.columns[0].justify, view.columns[1].justify = "right", "left"
        views.append(view)
    kept = [keep for site in sites for keep in site["keep"]]
    what = "heads" if len(views) == 1 and sites[0]["unit"] == "head" else "units"
    return [
        f"Prompt of {decision['tokens']} tokens: {sum(kept)} of {len(kept)} {what} kept "
        f"({share(decision['keep_ratio'])}); {decision['requested']} were requested.",
        *views,
        legend({outcome for site in sites for outcome in site["outcome"]}),
    ]


def of_site(decision: dict[str, Any], number: int) -> list[Any]:
    """One site, unit by unit: its signals, how far from those of training, its logit, and what became of it."""
    site = decision["sites"][number]
    columns: dict[str, list[Any]] = {site["unit"]: [str(number) for number in range(len(site["outcome"]))]}
    for name, values in site["signals"].items():
        columns[name] = [f"{value:.3g}" for value in values]
        if name in site["deviations"]:
            columns[f"{name}, σ"] = [f"{value:+.1f} σ" for value in site["deviations"][name]]
    columns["logit"] = [f"{value:+.2f}" for value in site["logit"]]
    columns["decision"] = [Text(outcome, style=SIGNS[outcome][1]) for outcome in site["outcome"]]
    view = table(f"site {number}, {site['name']}", list(columns), zip(*columns.values(), strict=True), padding=(0, 1))
    view.columns[0].justify, view.columns[-1].justify = "right", "left"
    return [
        view,
        f"A {site['unit']} is requested when its logit exceeds {decision['threshold']:.4g}. σ: standard deviations "
        "from the prompts of the training.",
    ]


def row_of_units(outcomes: Sequence[str]) -> Text:
    """A sign per head."""
    return Text.assemble(*(SIGNS[outcome] for outcome in outcomes))


def legend(outcomes: set[str]) -> Text:
    """What the signs mean, those that were used."""
    used = [name for name in SIGNS if name in outcomes]
    return Text.assemble(*(part for name in used for part in (SIGNS[name], f" {MEANINGS.get(name, name)}   ")))


def _kept_and_pruned(values: Sequence[float], keep: Sequence[int]) -> str:
    """Mean over kept and over pruned heads."""
    groups = [[value for value, kept in zip(values, keep, strict=True) if kept == wanted] for wanted in (1, 0)]
    return "  ".join(f"{f'{fmean(group):.3g}' if group else '–':>6}" for group in groups)
