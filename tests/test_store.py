"""Rows are appended whole, and what a crash cut short hurts no other row."""

import json

import pytest

from microglia import store
from microglia.errors import DataError
from tests.full_disk import room_for

ROWS = [{"name": "first", "value": 1.5}, {"name": "zweite, äöü", "value": None}]


def values(path):
    return [row for _, row in store.read(path)]


def test_rows_come_back_in_order_with_their_lines(tmp_path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    store.append(path, ROWS[:1])
    store.append(path, [])
    store.append(path, ROWS[1:])
    assert values(path) == ROWS
    assert [where for where, _ in store.read(path)] == [f"{path}, line 1", f"{path}, line 2"]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_row_cut_short_anywhere_is_passed_over_and_swallows_no_other(cut, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    store.append(path, ROWS)
    last = len(path.read_bytes().splitlines(keepends=True)[1])
    assert cut < last
    path.write_bytes(path.read_bytes()[: -min(cut + 1, last - 1)])  # at least the end of the line and the brace
    assert values(path) == ROWS[:1]
    store.append(path, [{"after": 1}])
    assert values(path) == [*ROWS[:1], {"after": 1}]


def test_a_row_without_its_end_of_line_is_whole(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    store.append(path, ROWS)
    path.write_bytes(path.read_bytes().rstrip())
    store.append(path, [{"after": 1}])
    assert values(path) == [*ROWS, {"after": 1}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_all_rows_are_written_or_none(bad, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"cannot be written as JSON .* convert or leave out the rest"):
        store.append(path, [ROWS[0], {"bad": bad}])
    assert not path.exists()


def test_a_full_disk_leaves_the_rows_as_they_were(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    store.append(path, ROWS)
    before = path.read_bytes()
    with room_for(len(before) + 10), pytest.raises(DataError, match=r"cannot be written .*; make room"):
        store.append(path, ROWS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["text", "[1]", "1", "\ufeff{}"])
def test_a_file_of_something_else_is_refused(text, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + text)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3 is not a JSON object; mend or delete that line"):
        store.read(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read \(No such file.*; give a JSON-lines file"):
        store.read(tmp_path / "rows.jsonl")
