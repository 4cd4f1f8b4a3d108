"""The programme: cells in order of importance, each within its own time, and the table of all that is there last.

Nothing that a cell does may cost the others theirs. An alarm ends it at its cap; a device that an error made unusable,
or a call that no alarm reaches, ends the process, and another one goes on with the next cell.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from bench.gpu.bench import Bench
from bench.gpu.cells import Cell, cells
from bench.gpu.options import Options
from bench.gpu.table import printed
from microglia.record import read_records

LEAST = 5.0  # seconds below which no cell is begun
TABLE = 2.0  # seconds that are left for the table
GRACE = 15.0  # seconds after which a cell that no alarm ended is ended from outside
AGAIN = 3.0  # seconds to the next alarm: what is raised while Python collects garbage, say, is lost


class Over(BaseException):
    """A cell's time is over. No Exception, which a compiler or a cell's own parts would take for a failure."""


class Stopped(BaseException):
    """The programme was told to end."""


def run(options: Options, *, began: float) -> int:
    """Measure until all is measured or the budget is spent; then the table. Returns the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("no CUDA device; on other machines, see that this works with --tiny")
    bench = Bench(options, device)
    if options.known is not None and options.known.exists():
        bench.records += read_records(options.known)
    programme = Programme(bench, until=began + options.budget)
    status = 0
    with told_to_end() as programme.ending:
        try:
            programme.begin()
        except (Stopped, KeyboardInterrupt):
            bench.say("stopped: the programme was told to end")
            status = 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the table is printed, come what may
        print(f"\n{printed(bench.rows(), bench.lines)}\n{time.monotonic() - began:.0f} s in all", flush=True)
    return status


class Programme:
    """Cells in turn. until: when the budget is spent, on the monotonic clock."""

    def __init__(self, bench: Bench, until: float) -> None:
        self.bench, self.until = bench, until
        self.passed = set(bench.options.skip)  # cells that another process need not look at
        self.ending = Ending()

    def left(self) -> float:
        """Seconds in which something may still be measured."""
        return self.until - TABLE - time.monotonic()

    def begin(self) -> None:
        """Every cell that is asked for, not known yet, and has time left."""
        options = self.bench.options
        name = self.bench.circumstances["device"]
        with self.bench.attempt("the device's bandwidth"):
            self.bench.say(f"{name}: reads {self.bench.bandwidth():,.0f} GB/s")
        for cell in cells(options):
            wanted = not options.only or cell.name in options.only
            if self.done(cell):
                self.passed.add(cell.name)
            if cell.name in self.passed or not wanted:
                continue
            if cell.lacks:
                self.bench.say(f"{cell.name}: not measured, {cell.lacks}")
            elif self.left() < LEAST:
                self.bench.say(f"{cell.name}: not measured, out of time")
            else:
                self.measure(cell)

    def key(self, cell: Cell) -> dict[str, object]:
        return {"cell": cell.name, "layers": self.bench.options.layers}

    def done(self, cell: Cell) -> bool:
        """Whether an earlier run went through this cell."""
        return self.bench.known("gpu_cell", **self.key(cell))

    def measure(self, cell: Cell) -> None:
        """One cell within its time; recorded only when it went through, so that another run goes on with it."""
        began, bench = time.monotonic(), self.bench
        cap = min(bench.options.cap or cell.cap, self.left())
        print(f"\n{cell.name}, at most {cap:.0f} s", flush=True)
        self.passed.add(cell.name)
        failures, stuck = bench.failures, f"{cell.name}: ended from outside, {GRACE:.0f} s after its {cap:.0f}"
        try:
            with watched(cap + GRACE, lambda: self.go_on(stuck)), self.ending.alarm(cap), bench.attempt(cell.name):
                cell.measure(bench)
        except Over:
            bench.failed(f"{cell.name}: its {cap:.0f} s were over")
        if bench.failures == failures:
            bench.write("gpu_cell", time.monotonic() - began, "s", self.key(cell))
        torch.compiler.reset()
        bench.tidy()
        if not usable(bench.device):
            self.go_on(f"{cell.name}: left the device unusable")

    def go_on(self, line: str) -> NoReturn:
        """Another process goes on with the cells after this one: this one, or its device, is lost."""
        self.bench.say(line)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.bench.options.output is None or self.left() < LEAST:
            print(printed(self.bench.rows(), self.bench.lines), flush=True)
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)  # a timer outlives this process's programme
        more = ["--budget", f"{self.left() + TABLE:.0f}", "--resume", str(self.bench.options.output)]
        os.execv(sys.executable, [sys.executable, *sys.argv, *more, "--skip", ",".join(sorted(self.passed))])


def usable(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access it never does again in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


class Ending:
    """How work is ended from a signal's handler, again and again until it has ended. asked: whether all of it is."""

    def __init__(self) -> None:
        self.asked = False

    def stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Of a signal to terminate."""
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        signal.signal(signal.SIGALRM, self.over)
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise Stopped

    def over(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Of an alarm."""
        raise Stopped if self.asked else Over

    @contextmanager
    def alarm(self, seconds: float) -> Iterator[None]:
        """Raise Over inside after so many seconds."""
        signal.signal(signal.SIGALRM, self.over)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), AGAIN)
        try:
            yield
        finally:
            if not self.asked:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def watched(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Act from another thread after so many seconds, should this one still be inside."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def told_to_end() -> Iterator[Ending]:
    """While inside, a signal to terminate raises Stopped."""
    ending = Ending()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, ending.stop)
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
