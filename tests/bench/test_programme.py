"""The programme of the GPU's benchmark: every cell within its own time, and what was measured is never lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import programme
from bench.gpu.cells import Cell
from bench.gpu.options import options
from microglia.record import read_records

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def measure(monkeypatch, capsys):
    """A function of cells and options: runs the programme with these cells; returns its status and what it said."""

    def run(cells, *arguments):
        monkeypatch.setattr(programme, "cells", lambda options: cells)
        status = programme.run(options(None, ["--tiny", *arguments]), began=time.monotonic())
        return status, capsys.readouterr().out

    return run


def writes(name, then=lambda: None):
    """A cell that writes one number, and then does something."""

    def cell(bench):
        bench.write("made", 1.0, "ms", {"of": name})
        then()

    return Cell(name, 5.0, cell)


def names(file):
    return [record.extra["of"] for record in read_records(file) if record.name == "made"]


def done(file):
    return [record.extra["cell"] for record in read_records(file) if record.name == "gpu_cell"]


def test_a_cell_that_takes_too_long_costs_its_own_time_and_keeps_what_it_wrote(measure, tmp_path):
    file = tmp_path / "gpu.jsonl"

    def slow():
        for _ in range(2000):
            try:
                time.sleep(0.01)
            except Exception as error:  # as a library does with what goes wrong in it
                raise AssertionError("an alarm was taken for a failure") from error

    long = Cell("long", 0.2, writes("long", slow).measure)
    began = time.monotonic()
    status, said = measure([long, writes("short")], "--output", str(file))
    assert time.monotonic() - began < 5
    assert status == 0
    assert "long: its 0 s were over" in said
    assert names(file) == ["long", "short"]
    assert done(file) == ["short"]


def test_what_fails_says_so_in_one_line_and_the_rest_is_measured(measure, tmp_path):
    file = tmp_path / "gpu.jsonl"

    def fails(bench):
        raise RuntimeError("no such kernel\nand more")

    def empties(bench):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    cells = [Cell("one", 5.0, fails), Cell("two", 5.0, empties), Cell("three", 0.0, fails, "its weights are not here")]
    said = measure([*cells, writes("four")], "--output", str(file))[1]
    assert "one: not measured, RuntimeError: no such kernel\n" in said
    assert "two: not measured, out of memory\n" in said
    assert "three: not measured, its weights are not here\n" in said
    assert done(file) == ["four"]


def test_a_run_goes_on_with_what_is_not_done(measure, tmp_path):
    file = tmp_path / "gpu.jsonl"

    def fails():
        raise RuntimeError("once")

    measure([writes("one"), writes("two", fails)], "--output", str(file))
    said = measure([writes("one"), writes("two"), writes("three")], "--resume", str(file))[1]
    assert names(file) == ["one", "two", "two", "three"]
    assert done(file) == ["one", "two", "three"]
    assert "one, at most" not in said
    assert [r.name for r in read_records(file)].count("gpu_bandwidth") == 1


def test_cells_are_chosen_by_name(measure, tmp_path):
    file = tmp_path / "gpu.jsonl"
    cells = [writes("one"), writes("two"), writes("three")]
    measure(cells, "--output", str(file), "--only", "one,two", "--skip", "one")
    assert names(file) == ["two"]


def test_nothing_begins_when_the_budget_is_spent(measure, tmp_path):
    status, said = measure([writes("one")], "--budget", "3", "--output", str(tmp_path / "gpu.jsonl"))
    assert status == 0
    assert "one: not measured, out of time" in said


def test_a_cell_gets_no_more_than_is_left_of_the_budget(measure):
    began = time.monotonic()
    said = measure([writes("long", lambda: time.sleep(60))], "--budget", "8")[1]
    assert time.monotonic() - began < 15
    assert "its 6 s were over" in said or "its 5 s were over" in said


def test_told_to_end_it_prints_the_table_of_what_is_there(measure, tmp_path):
    file = tmp_path / "gpu.jsonl"
    cells = [writes("one"), writes("two", lambda: os.kill(os.getpid(), signal.SIGTERM)), writes("three")]
    status, said = measure(cells, "--output", str(file))
    assert status == 1
    assert "stopped: the programme was told to end" in said
    assert said.rstrip().endswith("s in all")
    assert "cells, in seconds: one " in said
    assert names(file) == ["one", "two"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def replaced(monkeypatch):
    """What this process would have been replaced by."""
    calls = []

    def execv(path, arguments):
        calls.append(arguments)
        raise KeyboardInterrupt  # what comes after it belongs to the other process

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--tiny"])
    return calls


def test_another_process_goes_on_where_the_device_is_lost(measure, monkeypatch, replaced, tmp_path):
    file = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(programme, "usable", lambda device: False)
    measure([writes("one"), writes("two")], "--output", str(file), "--skip", "zero")
    ((program, *arguments),) = replaced
    assert program == sys.executable
    again = options(None, arguments[1:])
    assert again.known == again.output == file
    assert again.skip == ("one", "zero")
    assert 400 < again.budget < 420
    assert names(file) == ["one"]


def test_another_process_goes_on_where_no_alarm_reaches_a_cell(measure, monkeypatch, replaced, tmp_path):
    monkeypatch.setattr(programme, "GRACE", 0.1)

    def deaf():
        until = time.monotonic() + 1
        while time.monotonic() < until:
            try:
                time.sleep(0.05)
            except BaseException:
                continue

    cell = Cell("deaf", 0.1, writes("deaf", deaf).measure)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    said = measure([cell], "--output", str(tmp_path / "gpu.jsonl"))[1]
    assert "deaf: ended from outside" in said
    assert replaced[0][-2:] == ["--skip", "deaf"]


@pytest.mark.slow
def test_the_command_runs_from_a_bare_checkout_and_ends_with_the_table_when_it_is_told_to(tmp_path):
    file = tmp_path / "gpu.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--tiny", "--output", str(file)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (file.exists() and "gpu_decode" in file.read_text()):
            time.sleep(0.1)
        process.terminate()
        said = process.communicate()[0]
    assert process.returncode == 1
    assert "phi3-mini, 2 layers, 1 × 24\n  dense " in said
    assert "not measured            (≥ 1.30×) dense step" in said
    assert all(Path(record.command.split()[1]).name == "gpu.py" for record in read_records(file))
