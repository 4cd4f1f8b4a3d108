"""Time and memory: every speed-up beside its ceiling, the bytes of a decode step, the peak of a request."""

from collections.abc import Sequence
from typing import Any

from microglia.report import charts, words
from microglia.report.section import Figure, Section
from microglia.report.sources import Findings, Timing

MIB = 2**20
SUBJECT = ("model", "layers", "dtype", "device")  # of a measurement: what only a chart of its own compares fairly
SPEED = "Hollow: what the bytes saved would allow. Filled: what was measured. Thin line: 95 % interval."
BEYOND = " Beyond its ceiling: the dense operations did not reach the memory's speed themselves."
PEAK = (
    "The most that was held while a prompt was read, heads were cut and the answer was written: a GPU's tensors, or "
    "the whole process on a CPU. Cut weights lie beside the dense ones, which stay; the key/value cache shrinks."
)


def cost(findings: Findings) -> Section:
    """Speed beside its ceiling, bytes of a decode step, and memory: charts of their own for every model measured."""
    subjects: dict[tuple[Any, ...], list[Timing]] = {}
    for timing in findings.timings:
        subjects.setdefault(_of(timing), []).append(timing)
    figures = [
        figure for timings in subjects.values() for figure in _figures(timings, _subject(timings[0], list(subjects)))
    ]
    pruned = [timing for timing in findings.timings if timing.row.variant != "dense"]
    if not pruned:
        return Section("cost", "")
    best = next((timing for timing in pruned if timing.row.variant.endswith(words.TOTAL)), pruned[-1])
    intro = "Decoding moves bytes, so every speed-up stands beside the best that the saved bytes allow. "
    several = len({_case(timing) for timing in pruned}) > 1
    differs = _differs(findings.timings)
    parts = [_subject(best, list(subjects)), _named(best, several, differs) if several else ""]
    intro += words.speed(best.row, ", ".join(part for part in parts if part))
    return Section("cost", "Time and memory", intro, figures)


def _figures(timings: Sequence[Timing], subject: str) -> list[Figure]:
    """The charts of one model; none without pruned timings."""
    differs = _differs(timings)
    pruned = [timing for timing in timings if timing.row.variant != "dense"]
    if not pruned:
        return []
    of = f" · {subject}" if subject else ""
    several = len({_case(timing) for timing in pruned}) > 1
    shown = [timing for timing in pruned if _saves(timing)] if several else pruned
    speeds = [
        charts.Speed(
            _named(timing, several, differs),
            timing.row.ratio_to_dense,
            timing.row.ratio_ci95,
            timing.row.ceiling,
            timing.row.realised_share,
        )
        for timing in shown
    ]
    listed = "; ".join(f"{s.name} {s.ratio:.2f}× of at most {s.ceiling:.2f}×" for s in speeds[:8])
    figures = [
        Figure(
            f"Speed-up beside its ceiling{of}",
            charts.ceilings(speeds, f"Measured decode speed-up beside its ceiling{of}: {listed}."),
            ["", "batch", "context", "kept", "ms/token", "speed-up", "95 %", "ceiling", "share", "paid back after"],
            [_timing(timing) for timing in timings],
            SPEED + (BEYOND if any((timing.row.realised_share or 0) > 1 for timing in shown) else ""),
        )
    ]
    both = [timing for timing in timings if timing.row.variant == "dense" or _saves(timing)]
    steps = _stacks(both, several, differs, ("weights", "weight_bytes"), ("KV cache", "kv_bytes"))
    kinds = [(0, "weights"), (1, "KV cache")]
    alt = f"Bytes that a decode step reads{of}: " + "; ".join(
        f"{n} {sum(p[2] for p in parts):,.1f} MiB" for n, parts in steps[:8]
    )
    titles = ["", "weights, MiB", "KV cache, MiB"]
    table = [[name, *(f"{amount:,.2f}" for *_, amount in parts)] for name, parts in steps]
    figures.append(
        Figure(f"Bytes of a decode step{of}", charts.stacked(steps, alt + ".", "MiB"), titles, table, legend=kinds)
    )
    if peaks := [timing for timing in both if timing.row.peak_bytes]:
        memory = _stacks(peaks, several, differs, ("peak", "peak_bytes"))
        alt = f"Peak memory of a request{of}: " + "; ".join(f"{n} {p[0][2]:,.0f} MiB" for n, p in memory[:8]) + "."
        table = [[name, f"{parts[0][2]:,.1f}"] for name, parts in memory]
        chart = charts.stacked(memory, alt, "MiB")
        figures.append(Figure(f"Peak memory of a request{of}", chart, ["", "MiB"], table, PEAK))
    return figures


def _saves(timing: Timing) -> bool:
    """Whether it is of steps alone, from which pruned units are gone."""
    return timing.row.variant not in ("dense", "masked") and not timing.row.variant.endswith(words.TOTAL)


def _subject(timing: Timing, subjects: Sequence[tuple[Any, ...]]) -> str:
    """What was measured, as far as the page has several: the model, and what else tells it from the others."""
    if len(subjects) == 1:
        return ""
    alike = [subject for subject in subjects if subject[0] == timing.model]
    several = {key for key, values in zip(SUBJECT, zip(*alike, strict=True), strict=True) if len(set(values)) > 1}
    parts = {
        "model": str(timing.model),
        "layers": f"{timing.layers} layers" if timing.layers else "",
        "dtype": timing.dtype or "",
        "device": (timing.device or "").partition(" (")[0],
    }
    return ", ".join(part for key, part in parts.items() if part and key in several | {"model"})


def _of(timing: Timing) -> tuple[Any, ...]:
    return tuple(getattr(timing, name) for name in SUBJECT)


def _case(timing: Timing) -> tuple[Any, ...]:
    return (
        *_of(timing),
        timing.row.decides,
        timing.row.batch_size,
        timing.row.context,
        timing.row.keep_ratio if timing.row.variant != "dense" else None,
    )


def _differs(timings: Sequence[Timing]) -> set[str]:
    """What has to be said to tell measurements of a model apart."""
    return {key for key in ("batch_size", "context") if len({getattr(timing.row, key) for timing in timings}) > 1}


def _named(timing: Timing, several: bool, differs: set[str]) -> str:
    """What sets a measurement apart from the others on its chart; the table has the rest."""
    if not several:
        return words.label(timing.row.variant)
    parts = {
        "kept": "dense" if timing.row.variant == "dense" else f"{timing.row.keep_ratio:.0%} kept",
        "decides": "per row" if timing.row.variant != "dense" and timing.row.decides == "per row" else "",
        "batch_size": f"batch {timing.row.batch_size}",
        "context": f"context {timing.row.context:,}",
    }
    return ", ".join(part for key, part in parts.items() if part and key in {*differs, "kept", "decides"})


def _stacks(
    timings: Sequence[Timing], several: bool, differs: set[str], *parts: tuple[str, str]
) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """Bars in MiB, without the repetition of equal dense ones."""
    bars = [
        (
            _named(timing, several, differs),
            [(name, number, getattr(timing.row, key) / MIB) for number, (name, key) in enumerate(parts)],
        )
        for timing in timings
    ]
    unique = {(name, tuple(parts)): (name, parts) for name, parts in bars}
    return list(unique.values())


def _timing(timing: Timing) -> list[str]:
    pruned, tokens = timing.row.variant != "dense", timing.row.break_even_tokens
    return [
        words.label(timing.row.variant),
        str(timing.row.batch_size),
        f"{timing.row.context:,}",
        words.percent(timing.row.keep_ratio, 0),
        f"{timing.row.ms_per_token:.2f}",
        f"{timing.row.ratio_to_dense:.3f}" if pruned else "",
        words.interval(timing.row.ratio_ci95, "{:.3f}", 1) if pruned else "",
        f"{timing.row.ceiling:.3f}" if pruned else "",
        words.percent(timing.row.realised_share, 0) if pruned else "",
        f"{tokens} tokens" if tokens else "",
    ]
