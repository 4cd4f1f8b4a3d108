"""How figures are said: the same names, signs and digits in tables, charts, alternative texts and sentences."""

from collections.abc import Sequence

from microglia.report.sources import Entry, Run
from microglia.results import Adaptivity, BenchmarkRow, Difference

LABELS = {
    "pruned": "pruned (agents)",
    "agents": "pruned (agents)",
    "static_baseline": "static baseline",
    "masked": "masked only",
}
TOTAL = "_total"  # behind the name of an execution whose decision and slicing are counted in
STYLES = {"dense": 0, "pruned": 1, "agents": 1, "static_baseline": 2}  # the same colour and shape on every chart
PRUNED = ("pruned", "agents")
KEPT = {"head": "kept", "channel": "channel_kept", "sublayer": "sublayer_kept"}  # how often, in an evaluation's `heads`


def label(policy: str) -> str:
    """A policy's or variant's name for people."""
    if policy.endswith(TOTAL):
        return f"{policy.removesuffix(TOTAL)} with its decision"
    return LABELS.get(policy, policy)


def style(policy: str, others: Sequence[str]) -> int:
    """The number of a policy's colour: a fixed one where it has one, else by its place among `others`."""
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
    return " to ".join(form.format(factor * end) for end in known(ends) or ()).replace("-", "−")


def known(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    """None for an interval of which nothing is known."""
    return None if ends is None or ends[0] != ends[0] else ends


def difference(test: Difference | None) -> tuple[str, str, str]:
    """A difference of accuracies in points, its interval, and its p-value, corrected where several were tested."""
    if test is None:
        return "", "", ""
    p_value = test.p_value if test.p_holm is None else test.p_holm
    return points(test.diff), interval(test.ci95, "{:+.1f}"), f"{p_value:.2g}"


def verdict(run: Run) -> str:
    """What a run shows, in sentences."""
    dense, pruned = _dense(run), _pruned(run)
    if pruned is None:
        return ""
    sentence = f"On {pruned.prompts:,} problems the pruned model answers {percent(pruned.accuracy)} right"
    if dense:
        sentence += f", the dense model {percent(dense.accuracy)}"
    value, ends, _ = difference(pruned.to_dense)
    if value:
        sentence += f" ({value} points" + (f", 95 % interval {ends})" if ends else ")")
    sentence += f"; {percent(pruned.sparsity)} of its heads are gone."
    return " ".join(part for part in (sentence, adaptivity(run)) if part)


def adaptivity(run: Run) -> str:
    """What deciding by the prompt adds to the static baseline, and what it adds where fewer heads are kept."""
    sentence = _gain(run.adaptivity, "Agents against their static baseline at the same sparsity: ")
    if low := run.low_budget:
        sentence += _gain(low.adaptivity, f" With {percent(low.pruned.sparsity, 0)} of the heads pruned: ")
    return sentence


def _gain(adaptivity: Adaptivity | None, before: str) -> str:
    if adaptivity is None or not (ends := interval(adaptivity.ci95, "{:+.1f}")):
        return ""
    supports = "supports" if adaptivity.ci95[0] > 0 else "does not support"
    return (
        f"{before}{points(adaptivity.gain)} points, 95 % interval {ends}; "
        f"this run {supports} a gain from adapting to the prompt."
    )


def follows(run: Run) -> str:
    """Whether harder problems keep more heads."""
    if run.follows is None:
        return ""
    rho, ends = run.follows.rank_correlation, interval(run.follows.ci95, "{:+.2f}", 1)
    harder = run.follows.ci95[1] < 0
    meaning = "harder problems keep more heads" if harder else "sparsity does not fall with difficulty"
    return f"Rank correlation of difficulty and sparsity: {rho:+.2f}".replace("-", "−") + f", 95 % {ends}: {meaning}."


def speed(row: BenchmarkRow, case: str = "") -> str:
    """A decode step beside what its bytes allow; `case` says which one of several."""
    sentence = f"A decode step is {row.ratio_to_dense:.2f}× as fast as dense{f' ({case})' if case else ''}; "
    sentence += f"its ceiling is {row.ceiling:.2f}×"
    if (share := row.realised_share) is None:
        return sentence + "."
    return sentence + (
        f", of which {percent(share, 0)} is realised." if share > 0 else ", of which nothing is realised."
    )


def _dense(run: Run) -> Entry | None:
    return next((entry for entry in run.entries if entry.policy == "dense"), None)


def _pruned(run: Run) -> Entry | None:
    """What a run is about: the agents, where adaptivity was judged if there are several keep ratios."""
    kept = run.adaptivity.keep_ratios["agents"] if run.adaptivity else None
    entries = [entry for entry in run.entries if entry.policy in PRUNED]
    return min(entries, key=lambda e: 0 if kept is None else abs(1 - e.sparsity - kept), default=None)


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(figure, what it is, beside it) for the tiles at the top."""
    dense, pruned = _dense(run), _pruned(run)
    if pruned is None:
        return []
    tiles = [(percent(pruned.accuracy), "right, pruned", f"dense {percent(dense.accuracy)}" if dense else "")]
    value, ends, _ = difference(pruned.to_dense)
    if value:
        tiles.append((value, "points to dense", ends))
    tiles.append((percent(pruned.sparsity), "heads pruned", f"{pruned.prompts:,} problems"))
    if request := pruned.request:
        tiles.append(
            (f"{request.ratio_to_dense:.2f}×", "request speed-up", f"{interval(request.ratio_ci95, '{:.2f}', 1)}")
        )
    if timing := pruned.timing:
        tiles.append((f"{timing.ratio_to_dense:.2f}×", "decode speed-up", f"ceiling {timing.ceiling:.2f}×"))
    return tiles
