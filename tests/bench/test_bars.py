"""Bars of the GPU, and the table: what is said of made-up records, and of the first run's."""

import json
from pathlib import Path

import pytest

from bench.gpu.bars import bars, decoded
from bench.gpu.table import printed

FIRST = Path(__file__).resolve().parents[2] / "results" / "gpu-h200-first.jsonl"


def step(variant, ms, *, way="a", batch=1, context=512, **extra):
    place = {"shape": "phi3-mini", "layers": 32, "batch": batch, "context": context, "variant": variant, "way": way}
    return {"name": "gpu_decode", "value": ms, "extra": {**place, "ceiling": 1.5, **extra}}


def said(rows):
    return {bar.what: bar for bar in bars(rows)}


def test_each_variant_counts_in_its_fastest_way():
    rows = [
        step("hf static compiled", 2.5, way=""),
        step("dense", 2.0),
        step("dense", 1.6, way="b"),
        step("compact 0.75", 1.25, switch_ms=1.0),
        step("compact 0.75", 1.9, way="b", switch_ms=0.1),
    ]
    found = said(rows)
    assert found["dense step against the library's compiled one, 1 × 512"].value == pytest.approx(2.5 / 1.6)
    speed = found["75% of the heads, 1 × 512"]
    assert (speed.value, speed.verdict) == (pytest.approx(1.28), "kept")
    assert found["share of the ceiling, 75% of the heads, 1 × 512"].value == pytest.approx(
        (1 - 1 / 1.28) / (1 - 1 / 1.5)
    )
    switch = found["switch to 75% of the heads, 1 × 512"]
    assert (switch.value, switch.verdict) == (pytest.approx(0.8), "kept")


def test_a_bar_is_missed_from_either_side_or_not_measured():
    looking = {"shape": "phi3-mini", "layers": 32, "tokens": 2048, "looking_and_deciding": 0.05}
    rows = [
        step("dense", 10.0, batch=16, context=4096),
        step("rows 0.75", 9.0, batch=16, context=4096),
        {"name": "gpu_looking", "value": 0.021, "extra": looking},
    ]
    verdicts = {what: bar.verdict for what, bar in said(rows).items()}
    assert verdicts["75% of the heads, each row its own, 16 × 4,096"] == "MISSED"
    assert verdicts["entropies, added to reading a prompt"] == "MISSED"
    assert verdicts["all looking and deciding, added to reading a prompt"] == "kept"
    assert verdicts["75% of the heads, 1 × 512"] == "not measured"


def test_models_cut_short_keep_no_bar():
    row = step("dense", 1.0)
    row["extra"]["layers"] = 2
    assert {bar.verdict for bar in bars([row])} == {"not measured"}


def test_a_number_that_was_measured_again_is_the_later_one():
    rows = [step("dense", 2.0), step("dense", 3.0)]
    ((variants,),) = [list(decoded(rows).values())]
    assert [row["value"] for row in variants["dense"]] == [3.0]


def test_the_table_of_the_first_run_says_what_was_read_from_it():
    rows = [json.loads(line) for line in FIRST.read_text().splitlines()]
    table = printed(rows, ["a line"])
    assert "  compact 0.75           17.829 ms   bytes   6.148   ×0.571 of ×1.269  -354%   switch 26.13 ms" in table
    assert "entropies +6.3% [+5.9%, +6.9%], all looking and deciding +13.5%" in table
    assert "kept              1.40× (≥ 1.30×) dense step against" in table
    assert "MISSED            1.14× (≥ 1.20×) 75% of the heads, 16 × 4,096" in table
    assert "\na line\n" in table
