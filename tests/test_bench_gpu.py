"""bench/gpu.py: the whole programme of the GPU benchmark, on a tiny model and whatever device is here."""

import runpy
from pathlib import Path

import pytest

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
    assert {r.name for r in records} == {"gpu_bandwidth", "gpu_looking", "gpu_training_step", "gpu_decode"}
    for record in records:
        if record.name == "gpu_decode" and record.extra["variant"].startswith("compact"):
            assert record.extra["ceiling"] > 1
            assert record.extra["switch_ms"] > 0
    assert "batch 2, context 24" in out
    again = bench("--tiny", "--output", str(file))
    assert len(read_records(file)) == len(records) + 1  # the bandwidth is measured every time
    assert "batch 2" not in again


def test_nothing_begins_when_time_is_over(bench):
    out = bench("--tiny", "--minutes", "0.0001", "--only", "prefill,training")
    assert "takes" not in out
