"""What checkpoints promise: the settings that were tried, and the limit of what each may lose."""

from microglia.report import words
from microglia.report.section import Section
from microglia.report.sources import Findings

COLUMNS = ["", "heads kept", "right", "lost", "won", "points to dense", "at most lost"]


def promises(findings: Findings) -> Section:
    """One line per setting of each calibration, and what was concluded, in its own words."""
    sentences = [f"{name}: {promise.sentence}." for name, promise in findings.promises.items()]
    rows = [
        [
            name,
            words.percent(tried.keep_ratio),
            words.percent(tried.accuracy),
            str(tried.lost),
            str(tried.won),
            words.points(-tried.drop),
            f"{100 * tried.drop_bound:.1f}",
        ]
        for name, promise in findings.promises.items()
        for tried in promise.tried
    ]
    return Section("promise", "What is promised", " ".join(sentences), columns=COLUMNS if rows else [], rows=rows)
