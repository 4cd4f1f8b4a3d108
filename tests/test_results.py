"""Every kind of result comes back from its JSON as it was, and what is no result is refused in a sentence."""

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from microglia.errors import DataError
from microglia.results import KINDS, BenchmarkRow, Difference, Promise, Tried, from_json, part_from_json, plain

ROOT = Path(__file__).resolve().parents[1]
VERBS = {
    "evaluation",
    "judgement",
    "demo",
    "comparison",
    "ablation",
    "promise",
    "benchmark",
    "training",
    "export",
    "generation",
    "report",
}


def filled(hint: Any, depth: int = 0) -> Any:
    """A value of a declared type, with something in every field and every number different from its default."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return filled(arguments[0], depth)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: filled(hints[f.name], depth + 1) for f in fields(hint)})
    if origin is tuple:
        kinds = arguments[:1] * 2 if arguments[-1] is ... else arguments
        return tuple(filled(kind, depth + i) for i, kind in enumerate(kinds))
    if origin is list:
        return [filled(arguments[0], depth), filled(arguments[0], depth + 1)]
    if origin is dict:
        return {"a": filled(arguments[1], depth), "b": filled(arguments[1], depth + 1)}
    return {float: 0.25 + depth, int: 3 + depth, str: f"text {depth}", bool: True, Any: {"any": [1, None]}}[hint]


def example(kind: str) -> Any:
    return filled(KINDS[kind])


def test_every_verb_has_a_kind() -> None:
    assert set(KINDS) == VERBS
    assert {cls.version for cls in KINDS.values()} == {1}


@pytest.mark.parametrize("kind", sorted(VERBS))
def test_a_result_comes_back_as_it_was(kind: str) -> None:
    result = example(kind)
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(row)[:2] == ["kind", "version"]
    assert row.keys() == {"kind", "version", *(f.name for f in fields(result))}
    assert from_json(row) == result


@pytest.mark.parametrize("kind", sorted(VERBS))
def test_what_has_its_default_is_left_out_and_comes_back(kind: str) -> None:
    result = example(kind)
    short = replace(result, **{f.name: f.default for f in fields(result) if f.default is None or f.default == ()})
    row = short.to_json()
    assert not any(value in (None, (), {}) for name, value in row.items() if getattr(result, name, None) is not None)
    assert from_json(row) == short


@pytest.mark.parametrize("kind", sorted(VERBS))
def test_a_field_too_few_or_too_many_is_named(kind: str) -> None:
    row = example(kind).to_json()
    name = next(f.name for f in fields(KINDS[kind]))
    with pytest.raises(DataError, match=f"^x.json: {kind} has no {name}; write it again with this version"):
        from_json({key: value for key, value in row.items() if key != name}, "x.json")
    with pytest.raises(DataError, match=f"^x.json: {kind} has the unknown field colour; write it again"):
        from_json({**row, "colour": 1}, "x.json")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([], "x.json does not say what kind of result it is; write it again with this version of microglia"),
        ({"accuracy": 1.0}, "x.json does not say what kind of result it is; write it again"),
        ({"kind": "poem", "version": 1}, "x.json is of the unknown kind 'poem'; known are evaluation, judgement"),
        ({"kind": ["demo"], "version": 1}, r"x.json is of the unknown kind \['demo'\]"),
        ({"kind": "demo", "version": 2}, "x.json has version 2 of the kind 'demo', and this microglia reads up to 1"),
        ({"kind": "demo"}, "x.json has version None of the kind 'demo'"),
    ],
)
def test_what_is_no_result_is_refused(row, sentence) -> None:
    with pytest.raises(DataError, match=f"^{sentence}"):
        from_json(row, "x.json")


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("prompts", "many", "promise.prompts holds 'many'"),
        ("prompts", 1.5, "promise.prompts holds 1.5"),
        ("prompts", True, "promise.prompts holds True"),
        ("sentence", None, "promise.sentence holds None"),
        ("tried", {}, r"promise.tried holds \{\}"),
        ("tried", [1], r"promise.tried\[0\] holds a int"),
        ("tried", [{"target": 1}], r"promise.tried\[0\] has no drop, drop_bound, "),
    ],
)
def test_a_value_of_another_type_is_named(name, value, where) -> None:
    row = {**example("promise").to_json(), name: value}
    with pytest.raises(DataError, match=f"^x.json: {where}"):
        from_json(row, "x.json")


def test_null_stands_for_what_no_number_says() -> None:
    row = plain(Difference(0.5, (math.nan, math.inf), 1.0))
    assert row == {"diff": 0.5, "ci95": [None, None], "p_value": 1.0}
    again = part_from_json(Difference, row, "it")
    assert math.isnan(again.ci95[0])


def test_fields_are_read_by_name_too() -> None:
    promise: Promise = example("promise")
    assert promise["keep_ratio"] == promise.keep_ratio
    with pytest.raises(KeyError, match="nothing"):
        promise["nothing"]
    assert isinstance(promise.tried[0], Tried)


def test_the_rows_of_a_benchmark_say_all_that_they_measure() -> None:
    assert {"variant", "keep_ratio", "ratio_to_dense", "ceiling"} <= plain(filled(BenchmarkRow)).keys()


@pytest.mark.parametrize("name", ["demo.json", "compare/comparison.json", "ablation/ablation.json", "calibration.json"])
def test_committed_results_are_read(name: str) -> None:
    row = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    assert from_json(row, name).to_json() == row
