"""What each part of the recipe is worth: every variant's difference to the base, at one keep ratio for all."""

from collections.abc import Iterator

from microglia.report import charts, words
from microglia.report.section import Figure, Section
from microglia.report.sources import Findings, Variant

COLUMNS = ["", "right", "points to base", "95 % interval", "p", "loss", "own sparsity", "right at its own"]


def ablations(findings: Findings) -> Iterator[Section]:
    """A section per ablation."""
    for number, found in enumerate(findings.ablations):
        changes = [charts.Change(v.name, v.diff, v.diff_ci95) for v in found.variants if v.diff is not None]
        told = "; ".join(f"{c.name} {words.points(c.value)}" for c in changes[:8])
        alt = f"Accuracy of each variant minus that of the base recipe, in points: {told}."
        note = "Right of the line: better than the base. Whiskers: 95 % intervals, paired over prompts and seeds."
        rows = [_row(variant) for variant in found.variants]
        figure = Figure("Difference to the base recipe", charts.changes(changes, alt), COLUMNS, rows, note)
        suffix = f"-{number + 1}" if len(findings.ablations) > 1 else ""
        intro = (
            f"{found.prompts:,} prompts, {found.seeds} {'seed' if found.seeds == 1 else 'seeds'}, every variant with "
            f"{words.percent(found.keep_ratio, 0)} of the heads kept. The base recipe answers "
            f"{words.percent(found.variants[0].accuracy)} right."
        )
        title = "What each part of the recipe is worth"
        yield Section(f"ablation{suffix}", title, intro, [figure] if changes else [])


def _row(variant: Variant) -> list[str]:
    accuracy, sparsity = variant.own or (None, None)
    return [
        variant.name,
        words.percent(variant.accuracy),
        words.points(variant.diff),
        words.interval(variant.diff_ci95, "{:+.1f}"),
        words.small(variant.p_value),
        f"{variant.loss:.3f}",
        words.percent(sparsity),
        words.percent(accuracy),
    ]
