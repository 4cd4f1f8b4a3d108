"""What each part of the recipe is worth: every variant's difference to the base, at one keep ratio for all."""

from collections.abc import Iterator

from microglia.report import charts, words
from microglia.report.section import Figure, Section
from microglia.report.sources import Findings
from microglia.results import AblationRow

COLUMNS = ["", "right", "points to base", "95 % interval", "p", "loss", "sparsity as trained", "right as trained"]


def ablations(findings: Findings) -> Iterator[Section]:
    """A section per ablation."""
    for number, result in enumerate(findings.ablations):
        changes = [
            charts.Change(row.variant, row.to_base.diff, words.known(row.to_base.ci95))
            for row in result.rows
            if row.to_base
        ]
        listed = "; ".join(f"{c.name} {words.points(c.value)}" for c in changes[:8])
        alt = f"Accuracy of each variant minus that of the base recipe, in points: {listed}."
        note = "Right of the line: better than the base. Whiskers: 95 % intervals, paired over prompts and seeds."
        svg = charts.changes(changes, alt) if changes else ""
        figure = Figure("Difference to the base recipe", svg, COLUMNS, [_row(row) for row in result.rows], note)
        suffix = f"-{number + 1}" if len(findings.ablations) > 1 else ""
        seeds = len(result.seeds)
        intro = (
            f"{result.prompts:,} prompts, {seeds} {'seed' if seeds == 1 else 'seeds'}, every variant with "
            f"{words.percent(result.at_keep_ratio, 0)} of the heads kept. The base recipe answers "
            f"{words.percent(result.rows[0].accuracy)} right."
        )
        title = "What each part of the recipe is worth"
        yield Section(f"ablation{suffix}", title, intro, [figure] if changes else [])


def _row(row: AblationRow) -> list[str]:
    trained = row.as_trained
    return [
        row.variant,
        words.percent(row.accuracy),
        *words.difference(row.to_base),
        f"{row.loss:.3f}",
        words.percent(1 - trained.keep_ratio) if trained else "",
        words.percent(trained.accuracy) if trained else "",
    ]
