"""bench/gpu.py: the whole programme of the GPU benchmark, on a tiny model and whatever device is here."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from microglia.execution import Captured
from microglia.record import read_records

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"


@pytest.fixture
def bench(monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_tiny_run_measures_everything_and_goes_on_where_it_stopped(bench, tmp_path):
    file = tmp_path / "gpu.jsonl"
    out = bench("--tiny", "--output", str(file))
    records = read_records(file)
    cells = {(r.extra["batch"], r.extra["variant"]) for r in records if r.name == "gpu_decode"}
    own = {"dense", "masked 0.75", "compact 0.75", "masked 0.5", "compact 0.5"}
    assert {variant for batch, variant in cells if batch == 1} == {"hf", "hf static compiled"} | own
    assert {variant for batch, variant in cells if batch == 2} >= {"rows 0.75", "rows 0.5"}
    names = {"gpu_bandwidth", "gpu_looking", "gpu_training_step", "gpu_decode", "gpu_kernels", "gpu_way"}
    assert {r.name for r in records} == names
    for record in records:
        if record.name == "gpu_decode" and record.extra["variant"].startswith("compact"):
            assert record.extra["ceiling"] > 1
            assert record.extra["switch_ms"] > 0
            assert record.extra["costs_s"]["capture dense"] > 0
            assert set(record.extra["ways_ms"]) == {"none:stock:1", "none:products:1"}
    assert "batch 2, context 24" in out
    again = bench("--tiny", "--output", str(file))
    assert len(read_records(file)) == len(records) + 1  # the bandwidth is measured every time
    assert "batch 2" not in again
    assert "not measured" not in out


def test_nothing_begins_when_time_is_over(bench):
    out = bench("--tiny", "--minutes", "0.0001", "--only", "prefill,training")
    assert "takes" not in out


def test_what_fails_costs_its_own_part_only(bench, tmp_path, monkeypatch):
    """Out of memory in one cell, no training packages, a compiler that breaks: the rest is measured."""
    step_for = Captured.step_for

    def small(self, batch, length, **options):
        if batch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.model.attention == "products":
            raise RuntimeError("no such kernel\nand more")
        return step_for(self, batch, length, **options)

    monkeypatch.setattr(Captured, "step_for", small)
    monkeypatch.setitem(sys.modules, "microglia.training.loss", None)
    out = bench("--tiny", "--output", str(tmp_path / "gpu.jsonl"))
    assert "reasoner batch 1 context 24: not measured, out of memory" in out
    assert "reasoner, a training step: not measured, ModuleNotFoundError" in out
    assert "ours none:products:1, batch 2, context 24: not measured, RuntimeError: no such kernel\n" in out
    cells = {r.extra["batch"] for r in read_records(tmp_path / "gpu.jsonl") if r.name == "gpu_decode"}
    assert cells == {2}


def test_time_that_is_over_ends_everything(bench, monkeypatch):
    def over(self, batch, length, **options):
        raise TimeoutError

    monkeypatch.setattr(Captured, "step_for", over)
    out = bench("--tiny", "--only", "decode")
    assert "stopped: the time was over" in out
    assert "batch 2" not in out


def test_bars_are_held_against_what_was_measured():
    bars = runpy.run_path(str(SCRIPT), run_name="bench")["bars"]

    def variant(ms, share=None, switch=None):
        return {"ms": ms, "realised_share": share, "switch_ms": switch, "ratio_to_dense": 2 / ms}

    row = {"shape": "phi3-mini", "batch": 1, "context": 512}
    row["variants"] = {
        "hf static compiled": variant(2.5),
        "dense": variant(2.0),
        "masked 0.75": variant(2.0, switch=9.0),
        "compact 0.75": variant(1.9, share=0.8, switch=1.0),
    }
    assert [line.split(" (bar")[0] for line in bars([row])] == [
        "kept     1.25", "MISSED   0.80", "kept     1.90", "MISSED   1.05",
    ]  # fmt: skip
