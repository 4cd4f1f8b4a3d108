"""The charts of the page: fronts, heat maps, lines and bars. Every mark carries the exact value that it stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from microglia.report.svg import Frame, Scale, around, picture, tag, text

WIDTH = 420.0
HEAT_WIDTH = 350.0
SHAPES = ("circle", "square", "diamond", "triangle", "down", "bar")
SIZE = 5.5
EDGE = 22.0  # room for half the label of a tick that stands at the end of its axis
LETTERS = 56  # that a line of a chart holds beside each other, on a phone too
Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Point:
    """A mark of a front with its intervals; `style` is the number of its colour and shape."""

    name: str
    x: float
    y: float
    x_ends: Ends = None
    y_ends: Ends = None
    style: int = 0


def marker(style: int, x: float, y: float, *inside: str, **attributes: object) -> str:
    """A small shape, so that colour is never the only difference."""
    s, shape = SIZE, SHAPES[style % len(SHAPES)]
    shared = {"class_": f"mark s{style % 8}", **attributes}
    if shape == "circle":
        return tag("circle", *inside, cx=x, cy=y, r=s, **shared)
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
        "triangle": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
        "down": [(0, 1.1), (1.05, -0.8), (-1.05, -0.8)],
        "bar": [(-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)],
    }[shape]
    places = " ".join(f"{x + dx * s:.2f},{y + dy * s:.2f}" for dx, dy in corners)
    return tag("polygon", *inside, points=places, data_x_place=x, data_y_place=y, **shared)


def best(points: Sequence[Point]) -> list[Point]:
    """The front: points than which no other is at least as far right and up, and further in one; from left to right."""
    front = [p for p in points if not any(q.x >= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in points)]
    return sorted(front, key=lambda p: (p.x, p.y))


def front(points: Sequence[Point], alt: str, x_label: str, x_format: str, *, dense: float | None = None) -> str:
    """Accuracy (up) against something that is better to the right; intervals as whiskers, the front dashed."""
    xs = [v for p in points for v in (p.x, *(p.x_ends or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_ends or ()))]
    low, high = around(ys, at_least=0.1)
    x_low, x_high = around(xs, at_least=0.05)
    frame = Frame.of(WIDTH, 300, (x_low, x_high), (max(0.0, low), min(1.0, high)))
    x_words = [(value, x_format.format(value)) for value in frame.x.ticks(5)]
    parts = [frame.axes(x_label, x_words, [(value, f"{value:.0%}") for value in frame.y.ticks(6)])]
    if dense is not None:
        y = frame.y(dense)
        parts.append(tag("line", x1=frame.x.start, x2=frame.x.end, y1=y, y2=y, class_="dense-line"))
    parts.append(tag("polyline", points=_places(frame, best(points)), class_="front-line"))
    for name in dict.fromkeys(p.name for p in points):
        group = sorted((p for p in points if p.name == name), key=lambda p: p.x)
        if len(group) > 1:
            parts.append(tag("polyline", points=_places(frame, group), class_=f"path s{group[0].style % 8}"))
    for p in points:
        x, y = frame.x(p.x), frame.y(p.y)
        whisker = f"whisker s{p.style % 8}"
        if p.y_ends:
            parts.append(tag("line", x1=x, x2=x, y1=frame.y(p.y_ends[0]), y2=frame.y(p.y_ends[1]), class_=whisker))
        if p.x_ends:
            parts.append(tag("line", x1=frame.x(p.x_ends[0]), x2=frame.x(p.x_ends[1]), y1=y, y2=y, class_=whisker))
    for p in points:
        hint = tag("title", escape(f"{p.name}: {p.y:.1%} right at {x_format.format(p.x)}"))
        data = {"data_name": p.name, "data_x": repr(p.x), "data_y": repr(p.y)}
        parts.append(marker(p.style, frame.x(p.x), frame.y(p.y), hint, **data))
    return picture(WIDTH, 300, alt, *parts)


def _places(frame: Frame, points: Sequence[Point]) -> str:
    return " ".join(f"{frame.x(p.x):.2f},{frame.y(p.y):.2f}" for p in points)


def heat(
    values: Sequence[Sequence[float]],
    alt: str,
    shade: Sequence[Sequence[float]],
    form: str,
    *,
    row_means: bool = False,
    ends: tuple[str, str] = ("0", "1"),
    unit: str = "head",
) -> str:
    """Site × unit. `shade` in [0, 1] is how strongly a cell is filled; `values` are what it stands for."""
    heads, sites = max(map(len, values)), len(values)
    left, top, right = 46.0, 34.0, 46.0
    wide = min(34.0, (HEAT_WIDTH - left - right) / heads)
    tall, gap = min(wide, 26.0), 1.5 if wide > 9 else 0.5
    parts = [text(unit, left + heads * wide / 2, 12, class_="label middle")]
    parts.append(text("site", 6, top + 10, class_="label"))
    for head in range(0, heads, 1 if heads <= 12 else 4):
        parts.append(text(head, left + (head + 0.5) * wide, top - 5, class_="tick middle"))
    for site, row in enumerate(values):
        y = top + site * tall
        if sites <= 16 or site % 4 == 0:
            parts.append(text(site, left - 6, y + tall / 2 + 4, class_="tick end"))
        for head, value in enumerate(row):
            hint = tag("title", escape(f"site {site}, {unit} {head}: {form.format(value)}"))
            place = {"x": left + head * wide, "y": y, "width": wide - gap, "height": tall - gap, "rx": min(3, wide / 5)}
            opacity = f"{min(1.0, max(0.0, shade[site][head])):.3f}"
            data = {"data_site": site, "data_head": head, "data_value": repr(value), "fill_opacity": opacity}
            parts.append(tag("rect", hint, class_="cell", **place, **data))
        if row_means:
            parts.append(_row_mean(sum(row) / len(row), left + heads * wide + 5, y, tall))
    bottom = top + sites * tall + 12
    parts.append(_key(left, bottom, ends))
    return picture(HEAT_WIDTH, bottom + 14, alt, *parts)


def _row_mean(mean: float, x: float, y: float, tall: float) -> str:
    """A share as a number where there is room, else as a bar."""
    if tall >= 12:
        return text(f"{mean:.0%}", x, y + tall / 2 + 4, class_="tick")
    return tag("rect", x=x, y=y, width=40 * mean, height=tall - 0.5, class_="mean")


def _key(left: float, y: float, ends: tuple[str, str]) -> str:
    """The shades, from low to high."""
    start = left + 6.2 * len(ends[0]) + 6
    steps = [
        tag("rect", x=start + 11.0 * i, y=y, width=11.0, height=10, class_="cell", fill_opacity=f"{i / 9:.3f}")
        for i in range(10)
    ]
    return tag("g", text(ends[0], left, y + 9, class_="tick"), *steps, text(ends[1], start + 116, y + 9, class_="tick"))


def lines(
    series: Mapping[str, tuple[int, Sequence[tuple[float, float]]]],
    alt: str,
    form: str,
    *,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Values over training steps; a series is its style and its (step, value) pairs. Styles above 7 are dashed."""
    values = [value for _, pairs in series.values() for _, value in pairs]
    steps = [step for _, pairs in series.values() for step, _ in pairs]
    low, high = y_range or around(values, at_least=1e-3 * max(map(abs, values)) or 1e-3)
    if min(values) >= 0:
        low = max(0.0, low)
    frame = Frame.of(WIDTH, 210, (min(0, *steps), max(steps)), (low, high), left=52)
    y_words = [(value, form.format(value)) for value in frame.y.ticks(4)]
    parts = [frame.axes("step", [(v, f"{v:g}") for v in frame.x.ticks(5)], y_words)]
    for name, (style, pairs) in series.items():
        places = " ".join(f"{frame.x(step):.2f},{frame.y(value):.2f}" for step, value in pairs)
        data = {"data_name": name, "data_steps": len(pairs), "data_last": repr(pairs[-1][1])}
        dashed = " dashed" if style >= 8 else ""
        parts.append(
            tag("polyline", tag("title", escape(name)), points=places, class_=f"line s{style % 8}{dashed}", **data)
        )
    return picture(WIDTH, 210, alt, *parts)


def columns(
    series: Mapping[str, tuple[int, Mapping[str, float]]], alt: str, label: str, *, sideways: bool = False
) -> str:
    """Shares by group, a bar per group and series: sideways where groups have names, upright where they are counts."""
    groups = list(dict.fromkeys(group for _, values in series.values() for group in values))
    highest = max(value for _, values in series.values() for value in values.values())
    most = min(1.0, around([0, highest], at_least=0.05)[1])
    return _sideways(series, groups, most, alt) if sideways else _upright(series, groups, most, alt, label)


def _bar(name: str, group: str, value: float, style: int, **place: object) -> str:
    hint = tag("title", escape(f"{name}, {group}: {value:.1%}"))
    data = {"data_name": name, "data_group": group, "data_value": repr(value)}
    return tag("rect", hint, class_=f"bar s{style % 8}", **place, **data)


def _upright(
    series: Mapping[str, tuple[int, Mapping[str, float]]], groups: list[str], most: float, alt: str, label: str
) -> str:
    frame = Frame.of(WIDTH, 240, (0, len(groups)), (0, most))
    x_words = [(i + 0.5, group) for i, group in enumerate(groups)]
    parts = [frame.axes(label, x_words, [(value, f"{value:.0%}") for value in frame.y.ticks(4)])]
    wide = (frame.x(1) - frame.x(0)) * 0.74 / len(series)
    for row, (name, (style, values)) in enumerate(series.items()):
        for i, group in enumerate(groups):
            if group not in values:
                continue
            x, y = frame.x(i + 0.13) + row * wide, frame.y(values[group])
            place = {"x": x, "y": y, "width": max(wide - 1.5, 1), "height": max(frame.y(0) - y, 0.0), "rx": 1.5}
            parts.append(_bar(name, group, values[group], style, **place))
    return picture(WIDTH, 240, alt, *parts)


def _sideways(series: Mapping[str, tuple[int, Mapping[str, float]]], groups: list[str], most: float, alt: str) -> str:
    each = 11.0 if len(series) == 1 else 14.0  # so that the numbers of neighbours do not touch
    step = len(series) * each + 13
    left = 14 + 7.6 * min(20, max(map(len, groups)))
    scale = Scale(0, most, left, WIDTH - 54)
    parts = [tag("line", x1=left, x2=left, y1=4, y2=6 + step * len(groups), class_="axis")]
    for i, group in enumerate(groups):
        y = 10 + i * step
        parts.append(text(group[:20], left - 8, y + len(series) * each / 2 + 4, class_="tick end"))
        for row, (name, (style, values)) in enumerate(series.items()):
            if group not in values:
                continue
            wide = max(scale(values[group]) - left, 0.0)
            parts.append(_bar(name, group, values[group], style, x=left, y=y + row * each, width=wide, height=each - 2))
            parts.append(text(f"{values[group]:.1%}", left + wide + 6, y + row * each + each / 2 + 3, class_="tick"))
    return picture(WIDTH, 14 + step * len(groups), alt, *parts)


@dataclass(frozen=True)
class Speed:
    """A measured speed-up with its interval and its ceiling."""

    name: str
    ratio: float
    ends: tuple[float, float]
    ceiling: float
    share: float | None


def ceilings(rows: Sequence[Speed], alt: str) -> str:
    """What could be gained over dense (hollow) and what was (filled), with the interval of the measurement."""
    values = [1.0, *(v for row in rows for v in (row.ratio, row.ceiling, *row.ends))]
    scale = Scale(*around(values, at_least=0.1, margin=0.06), EDGE, WIDTH - EDGE)
    step, bottom = 46.0, 46.0 * len(rows) + 8
    parts = []
    for value in scale.ticks(5):
        x = scale(value)
        mark = {"data_axis": "x", "data_tick": repr(value), "data_place": x}
        parts += [tag("line", x1=x, x2=x, y1=4, y2=bottom, class_="grid")]
        parts += [text(f"{value:.2f}×", x, bottom + 17, class_="tick middle", **mark)]
    parts.append(tag("line", x1=scale(1), x2=scale(1), y1=2, y2=bottom, class_="axis strong"))
    for i, row in enumerate(rows):
        y, zero = i * step + 8, scale(1)
        share = "" if row.share is None else f", {row.share:.0%} of it"
        words = f"{row.name}: {row.ratio:.2f}×, ceiling {row.ceiling:.2f}×{share}"
        parts.append(text(row.name, 14, y + 11, class_="tick strong halo"))
        figures = f"{row.ratio:.2f}×, ceiling {row.ceiling:.2f}×"
        if len(row.name) + len(figures) > LETTERS:
            figures = f"{row.ratio:.2f}× | {row.ceiling:.2f}×"
        parts.append(text(figures, WIDTH - 14, y + 11, class_="tick strong halo end"))
        track = {"x": min(zero, scale(row.ceiling)), "width": abs(scale(row.ceiling) - zero), "y": y + 17, "height": 14}
        parts.append(tag("rect", class_="ceiling", data_name=row.name, data_ceiling=repr(row.ceiling), **track))
        got = {"x": min(zero, scale(row.ratio)), "width": abs(scale(row.ratio) - zero), "y": y + 20, "height": 8}
        style = "bar s1" if row.ratio >= 1 else "bar s3"
        parts.append(tag("rect", tag("title", escape(words)), class_=style, data_value=repr(row.ratio), **got))
        at = {"y1": y + 24, "y2": y + 24, "class_": "whisker ink"}
        parts.append(tag("line", x1=scale(row.ends[0]), x2=scale(row.ends[1]), **at))
    parts.append(text("decode speed-up, dense = 1", WIDTH / 2, bottom + 34, class_="label middle"))
    return picture(WIDTH, bottom + 42, alt, *parts)


@dataclass(frozen=True)
class Change:
    """A difference of accuracies with its interval, as shares."""

    name: str
    value: float
    ends: Ends = None


def changes(rows: Sequence[Change], alt: str) -> str:
    """Differences to a base, one below the other; the line is the base."""
    values = [0.0, *(100 * v for row in rows for v in (row.value, *(row.ends or ())))]
    scale = Scale(*around(values, at_least=1.0), EDGE, WIDTH - EDGE)
    step, bottom = 38.0, 38.0 * len(rows) + 8
    parts = []
    for value in scale.ticks(5):
        x = scale(value)
        mark = {"data_axis": "x", "data_tick": repr(value), "data_place": x}
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=bottom, class_="grid"))
        parts.append(
            text(f"{value:+g}".replace("-", "−") if value else "0", x, bottom + 17, class_="tick middle", **mark)
        )
    parts.append(tag("line", x1=scale(0), x2=scale(0), y1=2, y2=bottom, class_="axis strong"))
    for i, row in enumerate(rows):
        y, number = i * step + 8, f"{100 * row.value:+.1f}".replace("-", "−")
        parts.append(text(f"{row.name}: {number}", 14, y + 9, class_="tick strong halo"))
        if row.ends:
            x1, x2 = (scale(100 * end) for end in row.ends)
            parts.append(tag("line", x1=x1, x2=x2, y1=y + 21, y2=y + 21, class_="whisker s1"))
        hint = tag("title", escape(f"{row.name}: {number} points"))
        data = {"data_name": row.name, "data_x": repr(row.value)}
        parts.append(marker(1, scale(100 * row.value), y + 21, hint, **data))
    parts.append(text("points of accuracy, base = 0", WIDTH / 2, bottom + 34, class_="label middle"))
    return picture(WIDTH, bottom + 42, alt, *parts)


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, int, float]]]], alt: str, unit: str) -> str:
    """Amounts that add up: a bar per row, in parts of (name, style, amount)."""
    most = max(sum(amount for *_, amount in parts) for _, parts in rows)
    scale, step = Scale(0, most * 1.02, 14, WIDTH - 14), 40.0
    shown = []
    for i, (name, parts) in enumerate(rows):
        y, done = i * step + 4, 0.0
        total = sum(amount for *_, amount in parts)
        shown.append(text(f"{name}: {total:,.1f} {unit}", 14, y + 11, class_="tick strong"))
        for part, style, amount in parts:
            hint = tag("title", escape(f"{name}, {part}: {amount:,.2f} {unit}"))
            place = {"x": scale(done), "y": y + 16, "width": scale(done + amount) - scale(done), "height": 14}
            data = {"data_name": name, "data_part": part, "data_value": repr(amount)}
            shown.append(tag("rect", hint, class_=f"bar s{style % 8}", **place, **data))
            done += amount
    return picture(WIDTH, step * len(rows) + 6, alt, *shown)
