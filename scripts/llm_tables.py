"""Tables of `scripts/llm_study.py`'s records, as Markdown; `scripts/update_figures.py` puts them into the pages.

A cell of one training shows its 95 % interval over prompts; of several trainings their mean, and from the least to the
most of them.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from microglia.record import Record, read_records

STUDY = "llm_study_"
METHODS = {
    "agents": "agents",
    "static": "static baseline",
    "taylor": "Taylor",
    "norm": "norm",
    "fluctuation": "fluctuation (FLAP)",
    "random": "random",
}
HEADS = (0.9, 0.8, 0.75, 0.7)
TASKS = {"arc-easy": "ARC-Easy", "gsm8k": "GSM8K"}


def records(folder: Path) -> list[Record]:
    """Everything that the arms of a model have measured; the latest where something was measured twice."""
    latest: dict[Any, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if not path.name.endswith(".ledger.jsonl"):
            for record in read_records(path):
                at = {name: record.extra.get(name) for name in ("arm", "dataset", "keep_ratio", "byte_share")}
                latest[record.name, *at.values()] = record
    return list(latest.values())


def heads(folder: Path) -> str:
    """Heads alone, by the share that is pruned."""
    found = [r for r in records(folder) if not r.extra.get("channels")]
    return _table(found, "keep_ratio", HEADS, lambda share: f"{1 - share:.0%} pruned")


def at(found: Sequence[Record], share: float) -> list[tuple[str, str, str]]:
    """Of every method: its name, KL and agreement where this share of the heads is kept."""
    rows = _by_method([r for r in found if not r.extra.get("channels")], "keep_ratio")
    return [
        (name, _kl(cells["kl", "prompts", share]), _share(cells["top1", "prompts", share]))
        for name, cells in rows
        if cells["kl", "prompts", share]
    ]


def bytes_of_a_step(folder: Path) -> str:
    """Heads and channels under one budget in bytes."""
    found = [r for r in records(folder) if r.extra.get("channels")]
    return _table(found, "byte_share", (0.75, 0.5), lambda share: f"{share:.0%} of the bytes")


def _table(found: Sequence[Record], share: str, shares: Sequence[float], at: Callable[[float], str]) -> str:
    """A row per method; a column per measure and share that was measured at all."""
    rows = _by_method(found, share)
    measures = [("KL", "kl", "prompts", _kl), ("top-1", "top1", "prompts", _share)]
    measures += [(title, "accuracy", task, _points) for task, title in TASKS.items()]
    columns = [
        (f"{title}, {at(x)}", (measure, data, x), shown)
        for title, measure, data, shown in measures
        for x in shares
        if any(cells[measure, data, x] for _, cells in rows)
    ]
    lines = [f"| method | {' | '.join(title for title, _, _ in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, cells in rows:
        lines.append(f"| {name} | {' | '.join(shown(cells[key]) for _, key, shown in columns)} |")
    return "\n".join(lines)


def _by_method(found: Sequence[Record], share: str) -> list[tuple[str, Any]]:
    """Methods in their order, and of each the records by measure, data set and share."""
    by_arm: dict[tuple[str, bool], Any] = defaultdict(lambda: defaultdict(list))
    for record in found:
        about = record.extra
        key = record.name.removeprefix(STUDY), about.get("dataset"), about.get(share)
        by_arm[about["method"], about["recovery"]][key].append(record)
    order = [(method, recovery) for recovery in (True, False) for method in METHODS]
    named = {(m, r): METHODS[m] + (", recovered" if r else "") for m, r in order}
    return [(named[key], by_arm[key]) for key in order if key in by_arm]


def _kl(found: list[Record]) -> str:
    return _several([r.value for r in found], _ends(found, 0.0), "{:.3f}")


def _share(found: list[Record]) -> str:
    return _several([r.value for r in found], None, "{:.3f}")


def _points(found: list[Record]) -> str:
    """Points of accuracy that are lost or won against the dense model, which stands behind them."""
    if not found:
        return "–"
    changes = [100 * (r.value - r.extra["dense"]) for r in found]
    ends = None if len(found) > 1 else tuple(100 * end for end in found[0].extra["ci95"])
    return f"{_several(changes, ends, '{:+.1f}')} of {100 * found[0].extra['dense']:.1f}"


def _ends(found: list[Record], dense: float) -> tuple[float, ...] | None:
    """The interval of a single training, from that of its difference to the dense model."""
    return tuple(dense + end for end in found[0].extra["ci95"]) if len(found) == 1 else None


def _several(values: Sequence[float], ends: tuple[float, ...] | None, form: str) -> str:
    if not values:
        return "–"
    between = (min(values), max(values)) if ends is None else ends
    mean = form.format(fmean(values))
    if ends is None and len(values) == 1:
        return mean
    brackets = "[]" if ends is not None else "()"
    return f"{mean} {brackets[0]}{', '.join(form.format(x) for x in between)}{brackets[1]}"
