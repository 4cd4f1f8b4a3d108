"""What checkpoints promise: the settings that were tried, and the limit of what each may lose."""

from microglia.report import words
from microglia.report.section import Section
from microglia.report.sources import Findings
from microglia.results import Tried

COLUMNS = ["", "heads kept", "right", "lost", "won", "points to dense", "at most lost"]


def promises(findings: Findings) -> Section:
    """One line per setting of each calibration, and what was concluded, in its own words."""
    sentences = [f"{name}: {promise.sentence}." for name, promise in findings.promises.items()]
    rows = [
        [
            name,
            words.percent(tried.keep_ratio),
            *_counted(tried),
            words.points(-tried.drop),
            f"{100 * tried.drop_bound:.1f}",
        ]
        for name, promise in findings.promises.items()
        for tried in promise.tried
    ]
    return Section("promise", "What is promised", " ".join(sentences), columns=COLUMNS if rows else [], rows=rows)


def _counted(tried: Tried) -> list[str]:
    """Right, lost and won answers; nothing where the loss counts none."""
    if tried.accuracy is None:
        return ["", "", ""]
    return [words.percent(tried.accuracy), str(tried.lost), str(tried.won)]
