"""How results look in a terminal: tables without frames, shares, points and intervals, and the sentences they make."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, padding: Any = 0, fold: bool = False
) -> Table:
    """A table without a frame: the first column on the left, folded if it may, and figures on the right."""
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding)
    for place, name in enumerate(columns):
        view.add_column(name, justify="right" if place else "left", no_wrap=bool(place) or not fold)
    for row in rows:
        view.add_row(*row)
    return view


def facts(rows: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    view = Table(show_header=False)
    view.add_column(style="bold")
    view.add_column(overflow="fold")
    for name, value in rows.items():
        view.add_row(name, str(value))
    return view


def share(value: float, digits: int = 1) -> str:
    """0.25 → 25.0%."""
    return f"{value:.{digits}%}"


def points(value: float) -> str:
    """A difference of shares: 0.012 → +1.2."""
    return f"{100 * value:+.1f}"


def interval(ends: tuple[float, float], form: str = "{:+.1f}", factor: float = 100, sign: str = " to ") -> str:
    """Nothing where an end is not known."""
    return "" if ends[0] != ends[0] else sign.join(form.format(factor * end) for end in ends)


def with_interval(text: str, *interval_arguments: Any) -> str:
    """A figure and its interval, where that is known."""
    return text + (f", 95 % interval {ends}" if (ends := interval(*interval_arguments)) else "")


def side_by_side(runs: Mapping[str, Any], difference: str, test: Any | None, title: str) -> list[Any]:
    """Summaries in columns, and a paired difference in a sentence."""
    rows = {
        "accuracy (95 % interval)": [
            f"{share(r.accuracy)} ({interval(r.accuracy_ci95, '{:.1f}', sign='–')})" for r in runs.values()
        ],
        "sparsity": [share(r.sparsity) for r in runs.values()],
        "sparsity per token": [
            "" if r.sparsity_per_token is None else share(r.sparsity_per_token) for r in runs.values()
        ],
        "tokens per answer": [f"{r.mean_tokens:.1f}" for r in runs.values()],
        "cut off": ["" if r.unfinished is None else share(r.unfinished) for r in runs.values()],
        "seconds": [f"{r.seconds:.1f}" for r in runs.values()],
    }
    lines = [(name, *cells) for name, cells in rows.items() if any(cells)]
    view: list[Any] = [table(title, ("", *runs), lines, padding=(0, 1), fold=True)]
    if test:
        words = with_interval(f"{difference}: {points(test.diff)} points", test.ci95)
        view.append(f"{words}, McNemar p = {test.p_value:.3g}")
    return view


# How a measure is called, how its figures are written, and its differences.
MEASURES: dict[str, tuple[str, str, str, float]] = {
    "accuracy": ("right", "{:.1%}", "{:+.1f}", 100),
    "unfinished": ("cut off", "{:.1%}", "{:+.1f}", 100),
    "kl": ("KL per token", "{:.4f}", "{:+.4f}", 1),
    "top1": ("top-1", "{:.1%}", "{:+.1f}", 100),
    "perplexity": ("perplexity", "{:.3f}", "{:+.3f}", 1),
    "exact_prefix": ("exact prefix", "{:.1f}", "{:+.1f}", 1),
    "same": ("same answer", "{:.1%}", "{:+.1f}", 100),
    "keep_ratio": ("heads kept", "{:.1%}", "{:+.1f}", 100),
}


def figures_table(figures: Sequence[Any], title: str) -> Table:
    """One line per figure, dense beside pruned; differences of shares are in points, KL in nats, prefixes in tokens."""
    rows, last = [], None
    for figure in figures:
        name, form, change, factor = MEASURES[figure.measure]
        test, dataset, difference = figure.difference, f"{figure.dataset}, {figure.prompts}", ""
        if test is not None:
            ends = interval(test.ci95, change, factor)
            difference = change.format(factor * test.diff) + (f" ({ends})" if ends else "")
        rows.append(
            (
                "" if dataset == last else dataset,
                name,
                "" if figure.dense is None else form.format(figure.dense),
                form.format(figure.pruned),
                difference,
                "" if test is None or test.p_value != test.p_value else f"{test.p_value:.2g}",
            )
        )
        last = dataset
    columns = ("data", "", "dense", "pruned", "difference (95 %)", "p")
    return table(title, columns, rows, padding=(0, 1), fold=True)


def adds(adaptivity: Any) -> str:
    """What deciding by the prompt adds to a static mask, in a sentence."""
    agents, baseline = (share(adaptivity.keep_ratios[name]) for name in ("agents", "static_baseline"))
    return (
        with_interval(f"Adapting to the input adds {points(adaptivity.gain)} points", adaptivity.ci95)
        + f", at {agents} of the heads against {baseline} of the static baseline's: this run "
        f"{'supports' if adaptivity.ci95[0] > 0 else 'does not support'} a gain."
    )


def follows(difficulty: Any | None) -> str:
    """Whether sparsity follows the difficulty, in a sentence."""
    if difficulty is None:
        return "The agents prune every prompt alike, so sparsity follows nothing."
    rho = f"{difficulty.rank_correlation:+.2f}"
    return with_interval(f"Rank correlation of steps and sparsity: {rho}", difficulty.ci95, "{:+.2f}", 1) + "."
