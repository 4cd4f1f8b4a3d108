"""SVG by hand: escaped elements, scales with round ticks, a frame with axes. Colours are the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


def tag(element: str, *children: str, **attributes: object) -> str:
    """`tag("text", "a", class_="tick", data_x=1)` → `<text class="tick" data-x="1">a</text>`; None is left out.

    Children are markup already; `text` makes markup of what is not.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    shown = "".join(f' {name}="{escape(_plain(value))}"' for name, value in named.items())
    return f"<{element}{shown}>{''.join(children)}</{element}>"


def text(words: object, x: float, y: float, **attributes: object) -> str:
    """A `<text>` at a place."""
    return tag("text", escape(str(words)), x=x, y=y, **attributes)


def picture(width: float, height: float, alt: str, *children: str, **attributes: object) -> str:
    """A whole picture with its alternative text; it takes the width that the page gives it."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=alt, **attributes)


def _plain(value: object) -> str:
    """Coordinates to a hundredth; data, which are given as texts, stay as they are."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` ↔ places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values in the range."""
        step = round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(raw: float) -> float:
    """The smallest of 1, 2, 2.5, 5 or 10 times a power of ten that is at least `raw`."""
    if not raw > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))


def around(values: Sequence[float], *, margin: float = 0.08, at_least: float = 0.0) -> tuple[float, float]:
    """A range that holds all values with a margin; at least so wide."""
    low, high = min(values), max(values)
    extra = max((high - low) * margin, (at_least - (high - low)) / 2, 1e-9)
    return low - extra, high + extra


@dataclass(frozen=True)
class Frame:
    """A plotting area inside a picture, with both scales."""

    width: float
    height: float
    x: Scale
    y: Scale

    @classmethod
    def of(
        cls,
        width: float,
        height: float,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        left: float = 46,
        right: float = 22,
        top: float = 12,
        bottom: float = 40,
    ) -> "Frame":
        return cls(width, height, Scale(*x_range, left, width - right), Scale(*y_range, height - bottom, top))

    def axes(self, x_label: str, x_words: Sequence[tuple[float, str]], y_words: Sequence[tuple[float, str]]) -> str:
        """Grid lines with what stands at them, and the name of the horizontal axis; the vertical one's is the title."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for value, words in y_words:
            place = self.y(value)
            parts.append(tag("line", x1=left, x2=right, y1=place, y2=place, class_="grid"))
            mark = {"data_axis": "y", "data_tick": repr(value), "data_place": place}
            parts.append(text(words, left - 7, place + 4, class_="tick end", **mark))
        for value, words in x_words:
            place = self.x(value)
            parts.append(tag("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="axis"))
            mark = {"data_axis": "x", "data_tick": repr(value), "data_place": place}
            parts.append(text(words, place, bottom + 17, class_="tick middle", **mark))
        parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        parts.append(text(x_label, (left + right) / 2, bottom + 34, class_="label middle"))
        return tag("g", *parts, class_="axes") if top < bottom else ""
