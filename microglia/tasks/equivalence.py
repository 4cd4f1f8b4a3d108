"""Whether two final answers are the same mathematics, by math-verify in a child process.

Some expressions never simplify, and `9^{9^{9}}` keeps Python inside one multiplication, which neither a signal nor
another thread can interrupt. A process can be killed.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec

from microglia.errors import ConfigError
from microglia.tasks import verifier

SECONDS = 10.0  # for one comparison
# Spellings without a meaning, so that equal answers need no algebra.
SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|\s|\$|\\\$")


def check_installed(task: str) -> None:
    """Raise ConfigError when math-verify is missing, before anything long has begun."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            f"task {task} compares answers with math-verify, which is not installed; pip install 'microglia[eval]'"
        )


def equivalent(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers, `gold` the right one, are equal: `\\frac12` and `0.5`, `x \\in [1,2]` and `[1,2]`.

    What cannot be told within `SECONDS` is not equal.
    """
    return _plain(gold) == _plain(answer) or VERIFIER.equal(gold, answer)


class Verifier:
    """The child process: started when first asked, again after it was killed or this process was forked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0  # process id; pipes must not be shared with a fork

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds the two equal in time."""
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except OSError:  # it has died
                said = ""
            finally:
                timer.cancel()
            if not said:
                self._stop()
            return said == "true\n"

    def stop(self) -> None:
        """End the child process, if there is one."""
        with self.lock:
            if self.owner == os.getpid():
                self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.owner != os.getpid():
            command = [sys.executable, "-P", verifier.__file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.owner = os.getpid()
            assert self.process.stdout is not None
            if self.process.stdout.readline() != "ready\n":
                self._stop()
                raise ConfigError("math-verify cannot be imported; pip install 'microglia[eval]'")
        return self.process

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # closes its pipes and waits for its end
            self.process = None


VERIFIER = Verifier()
atexit.register(VERIFIER.stop)


def _plain(answer: str) -> str:
    text = SPACING.sub("", re.sub(r"\\[dt]?frac", r"\\frac", answer)).rstrip(".")
    return re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
