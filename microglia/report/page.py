"""One self-contained HTML page of findings: no script, no font, no picture is fetched."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from microglia import __version__
from microglia.errors import MicrogliaError
from microglia.report import charts, words
from microglia.report.sections import sections
from microglia.report.sources import Findings, gather
from microglia.results import ReportResult

TITLE = "What the microglia kept"


def check_page(path: Path) -> None:
    """Raise MicrogliaError unless a page can be written to `path`: better known before than after."""
    if path.suffix not in (".html", ".htm"):
        raise MicrogliaError(f"{path} was given for the page; it must end in .html")
    if find_spec("jinja2") is None:
        raise MicrogliaError("a report needs jinja2, which is not installed; pip install 'microglia[report]'")


def page(findings: Findings, *, title: str = TITLE) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("microglia.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    first = findings.runs[0] if findings.runs else None
    return template.render(
        title=title,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        lede=words.verdict(first) if first else "",
        tiles=words.headline(first) if first else [],
        sections=sections(findings),
        svg=Markup,
        marker=_marker,
        version=__version__,
    )


def write_report(paths: list[Path], output: Path, *, title: str = TITLE) -> ReportResult:
    """Read runs, write the page; returns what was written. Raises MicrogliaError, DataError."""
    check_page(output)
    findings = gather(paths)
    text = page(findings, title=title)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MicrogliaError(f"{output} cannot be written ({error.strerror}); give another --output") from error
    return ReportResult(
        output=str(output),
        bytes=len(text.encode()),
        sections=tuple(section.name for section in sections(findings)),
        runs=tuple(run.title for run in findings.runs),
    )


def _marker(number: int) -> Any:
    """A legend's mark: a shape, or for curves a line (-1) and a dashed one (8)."""
    from markupsafe import Markup

    kinds = {-1: "line s1", 8: "line s0 dashed"}
    if number in kinds:
        inside = charts.tag("line", x1=1, x2=17, y1=8, y2=8, class_=kinds[number])
    else:
        inside = charts.marker(number, 8, 8)
    return Markup(charts.tag("svg", inside, viewBox="0 0 18 16", aria_hidden="true"))
