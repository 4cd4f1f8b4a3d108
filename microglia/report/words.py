"""How figures are said: the same names, signs and digits in tables, charts, alternative texts and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from microglia.report.sources import Result, Run

LABELS = {
    "pruned": "pruned (agents)",
    "agents": "pruned (agents)",
    "static": "static twin",
    "gate": "static twin",
    "compact": "compact",
    "compact_total": "compact with its decision",
    "masked": "masked only",
}
STYLES = {"dense": 0, "pruned": 1, "agents": 1, "static": 2, "gate": 2}  # the same colour and shape on every chart


def label(policy: str) -> str:
    """A policy's or variant's name for people."""
    return LABELS.get(policy, policy)


def style(policy: str, others: Sequence[str]) -> int:
    """The number of a policy's colour: its own where it has one, else by its place among `others`."""
    if policy in STYLES:
        return STYLES[policy]
    if policy.startswith("random"):
        return 3
    free = [name for name in dict.fromkeys(others) if name not in STYLES and not name.startswith("random")]
    return 4 + free.index(policy) % 4


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of shares, with its sign."""
    return "" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def interval(ends: tuple[float, float] | None, form: str = "{:.1f}", factor: float = 100) -> str:
    return "" if ends is None else " to ".join(form.format(factor * end) for end in ends).replace("-", "−")


def small(value: float | None) -> str:
    """A p-value."""
    return "" if value is None else f"{value:.2g}"


def verdict(run: Run) -> str:
    """What a run found, in sentences."""
    found = {result.policy: result for result in run.results}
    dense, pruned = found.get("dense"), _pruned(run)
    if pruned is None:
        return ""
    told = f"On {pruned.prompts:,} problems the pruned model answers {percent(pruned.accuracy)} right"
    if dense:
        told += f", the dense model {percent(dense.accuracy)}"
    if pruned.diff is not None:
        told += f" ({points(pruned.diff)} points"
        told += f", 95 % interval {interval(pruned.diff_ci95, '{:+.1f}')})" if pruned.diff_ci95 else ")"
    told += f"; {percent(pruned.sparsity)} of its heads are gone."
    return " ".join(part for part in (told, adaptivity(run)) if part)


def adaptivity(run: Run) -> str:
    """What looking at the prompt adds over the static twin, and what it adds where fewer heads are kept."""
    told = _gain(run.adaptivity, "Agents against their static twin at the same sparsity: ")
    if run.scarce:
        told += _gain(run.scarce, f" With {percent(run.scarce['sparsity'], 0)} of the heads pruned: ")
    return told


def _gain(found: Mapping[str, Any] | None, before: str) -> str:
    if not found or found.get("ci95") is None or None in found["ci95"]:
        return ""
    low, high = found["ci95"]
    supports = "supports" if low > 0 else "does not support"
    return (
        f"{before}{points(found['gain'])} points, 95 % interval {interval((low, high), '{:+.1f}')}; "
        f"this run {supports} a gain from adapting to the prompt."
    )


def follows(run: Run) -> str:
    """Whether harder problems keep more heads."""
    if not run.follows or run.follows.get("rank_correlation") is None:
        return ""
    rho, (low, high) = run.follows["rank_correlation"], run.follows["ci95"]
    meaning = "harder problems keep more heads" if high < 0 else "sparsity does not fall with difficulty"
    ends = interval((low, high), "{:+.2f}", 1)
    return f"Rank correlation of difficulty and sparsity: {rho:+.2f}".replace("-", "−") + f", 95 % {ends}: {meaning}."


def speed(row: Mapping[str, Any], case: str = "") -> str:
    """A decode step beside what its bytes allow; `case` says which one of several."""
    share = row.get("realised_share")
    told = f"A decode step is {row['ratio_to_dense']:.2f}× as fast as dense{f' ({case})' if case else ''}; "
    told += f"its ceiling is {row['ceiling']:.2f}×"
    if share is None:
        return told + "."
    return told + (f", of which {percent(share, 0)} is realised." if share > 0 else ", of which nothing is realised.")


def _pruned(run: Run) -> Result | None:
    """The result that a run is about: the agents, where adaptivity was judged if there are several keep ratios."""
    found = [r for r in run.results if r.policy in ("pruned", "agents")]
    kept = ((run.adaptivity or {}).get("keep_ratios") or {}).get("agents")
    return min(found, key=lambda r: abs(1 - r.sparsity - kept) if kept else 0, default=None)


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(figure, what it is, beside it) for the tiles at the top."""
    dense = next((r for r in run.results if r.policy == "dense"), None)
    pruned = _pruned(run)
    if pruned is None:
        return []
    beside = f"dense {percent(dense.accuracy)}" if dense else ""
    tiles = [(percent(pruned.accuracy), "right, pruned", beside)]
    if pruned.diff is not None:
        tiles.append((points(pruned.diff), "points to dense", interval(pruned.diff_ci95, "{:+.1f}")))
    tiles.append((percent(pruned.sparsity), "heads pruned", f"{pruned.prompts:,} problems"))
    if pruned.timing:
        ceiling = f"ceiling {pruned.timing['ceiling']:.2f}×"
        tiles.append((f"{pruned.timing['ratio_to_dense']:.2f}×", "decode speed-up", ceiling))
    return tiles
