"""How `microglia inspect --prompt` shows a decision: a row of heads per site, or a site head by head."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from microglia.cli.verb import table

SIGNS = {
    "kept": ("█", "bold green"),
    "kept to fill": ("▒", "green"),
    "pruned": ("·", "dim"),
    "displaced": ("○", "yellow"),
}


def overview(decision: dict[str, Any]) -> list[Any]:
    """Every site in a row: its heads, how many are kept, and the mean signals of those kept and those pruned."""
    sites = decision["sites"]
    heads = sum(len(site["keep"]) for site in sites)
    kept = sum(sum(site["keep"]) for site in sites)
    signals = list(sites[0]["signals"])
    view = table(None, "site", "heads", "kept", *(f"{name}: kept, pruned" for name in signals), padding=(0, 1))
    view.columns[0].justify, view.columns[1].justify = "right", "left"
    for number, site in enumerate(sites):
        means = [_kept_and_pruned(site["signals"][name], site["keep"]) for name in signals]
        view.add_row(str(number), row_of_heads(site["outcome"]), f"{sum(site['keep'])}/{len(site['keep'])}", *means)
    return [
        f"Prompt of {decision['tokens']} tokens: {kept} of {heads} heads kept ({decision['keep_ratio']:.1%}); "
        f"{decision['requested']} were requested.",
        view,
        legend({outcome for site in sites for outcome in site["outcome"]}),
    ]


def of_site(decision: dict[str, Any], number: int) -> list[Any]:
    """One site, head by head: its signals, how far from those of training, its logit, and what became of it."""
    site = decision["sites"][number]
    names = [column for name in site["signals"] for column in (name, *["deviation"] * (name in site["deviations"]))]
    view = table(f"site {number}, {site['name']}", "head", *names, "logit", "decision", padding=(0, 1))
    view.columns[0].justify, view.columns[-1].justify = "right", "left"
    for head, outcome in enumerate(site["outcome"]):
        cells: list[Any] = []
        for name, values in site["signals"].items():
            cells.append(f"{values[head]:.3g}")
            if name in site["deviations"]:
                cells.append(f"{site['deviations'][name][head]:+.1f} σ")
        cells += [f"{site['logit'][head]:+.2f}", Text(outcome, style=SIGNS[outcome][1])]
        view.add_row(str(head), *cells)
    return [
        view,
        f"A head is requested when its logit exceeds {decision['threshold']:.4g}. σ: standard deviations from the "
        "prompts of the training.",
    ]


def row_of_heads(outcomes: Sequence[str]) -> Text:
    """A sign per head."""
    return Text.assemble(*(SIGNS[outcome] for outcome in outcomes))


def legend(seen: set[str]) -> Text:
    """What the signs mean, those that were used."""
    meanings = {
        "kept": "kept",
        "kept to fill": "kept, not requested: counts are rounded up",
        "pruned": "pruned",
        "displaced": "requested, but better heads fill its group",
    }
    parts: list[Any] = []
    for outcome in SIGNS:
        if outcome in seen:
            parts += [SIGNS[outcome], f" {meanings[outcome]}   "]
    return Text.assemble(*parts)


def _kept_and_pruned(values: Sequence[float], keep: Sequence[int]) -> str:
    """Mean over kept and over pruned heads."""
    shown = []
    for wanted in (1, 0):
        chosen = [value for value, kept in zip(values, keep, strict=True) if kept == wanted]
        shown.append(f"{sum(chosen) / len(chosen):.3g}" if chosen else "–")
    return f"{shown[0]:>6}  {shown[1]:>6}"
