"""Whether two final answers are the same mathematics, by math-verify."""

import re
import threading
from importlib.util import find_spec

from microglia.errors import ConfigError

SECONDS = 5  # for one parse or comparison; some expressions never simplify
# Spellings without a meaning, so that equal answers need no algebra.
SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|\s|\$|\\\$")


def check_installed(task: str) -> None:
    """Raise ConfigError when math-verify is missing, before anything long has begun."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            f"task {task} compares answers with math-verify, which is not installed; pip install 'microglia[eval]'"
        )


def equivalent(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers, `gold` the right one, are equal: `\\frac12` and `0.5`, `x \\in [1,2]` and `[1,2]`."""
    if _plain(gold) == _plain(answer):
        return True
    from math_verify import parse, verify

    # Its time limit is a signal, which only the main thread can have.
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=limit) for side in (gold, answer)]
    return bool(verify(*sides, timeout_seconds=limit))


def _plain(answer: str) -> str:
    text = SPACING.sub("", re.sub(r"\\[dt]frac", r"\\frac", answer)).rstrip(".")
    return re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
