"""What a page is made of: sections with figures, each a chart with its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers: `columns` and `rows` are the table below it; `legend` is (style, name)."""

    title: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Section:
    """A heading, what it means, and its figures; `table` stands open where there is no chart."""

    name: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    listings: Sequence[tuple[str, str]] = ()
    narrow: bool = False
