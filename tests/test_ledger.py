"""A ledger does what is missing, and nothing twice."""

import pytest

from microglia.errors import DataError
from microglia.ledger import Ledger


def test_finished_work_is_not_done_again(tmp_path) -> None:
    path, done = tmp_path / "deep" / "ledger.jsonl", []

    def work(value):
        return lambda: done.append(value) or {"value": value}

    first = Ledger(path, {"model": "a"})
    assert first.get({"run": 1.5}, work(1)) == {"value": 1}
    assert first.get({"run": 1.5}, work(2)) == {"value": 1}
    again = Ledger(path, {"model": "a"})
    assert {"run": 1.5} in again
    assert again.get({"run": 1.5}, work(3)) == {"value": 1}
    assert Ledger(path, {"model": "b"}).get({"run": 1.5}, work(4)) == {"value": 4}
    assert done == [1, 4]


def test_a_line_that_was_cut_short_is_done_again_and_hurts_no_other(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    for run in (1, 2):
        Ledger(path).get({"run": run}, lambda run=run: run)
    path.write_bytes(path.read_bytes()[:-5])
    ledger = Ledger(path)
    assert {"run": 1} in ledger
    assert {"run": 2} not in ledger
    ledger.get({"run": 2}, lambda: 22)
    assert Ledger(path).get({"run": 2}, lambda: 3) == 22


def test_without_a_file_it_remembers_only_here() -> None:
    ledger = Ledger()
    assert ledger.get({"a": 1}, lambda: 5) == ledger.get({"a": 1}, lambda: 6) == 5
    assert {"a": 1} not in Ledger()


def test_a_file_that_is_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"name": "latency"}\n')
    with pytest.raises(DataError, match="so the file is no ledger; move it away"):
        Ledger(tmp_path / "x.jsonl")
