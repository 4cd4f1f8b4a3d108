"""What the GPU's benchmark measures, on tiny models and whatever device is here."""

import time
from contextlib import nullcontext

import pytest
import torch

from bench.gpu.cells import cells
from bench.gpu.options import Options, options
from bench.gpu.programme import run
from microglia.execution import Captured
from microglia.record import read_records

ONE, ROWS, UNITS = "phi3-mini 1x512", "phi3-mini 16x4096", "phi3-mini 1x512 head+channel"


@pytest.fixture
def bench(capsys, tmp_path):
    """A function of names of cells: measures them into one file, and returns what is said and the records."""
    file = tmp_path / "gpu.jsonl"

    def measure(*names, how="--output"):
        run(options(None, ["--tiny", "--only", ",".join(names), how, str(file)]), began=time.monotonic())
        return capsys.readouterr().out, read_records(file)

    measure.file = file
    return measure


def decoded(records):
    return {(r.extra["variant"], r.extra["way"]): r for r in records if r.name == "gpu_decode"}


def test_one_prompt_is_decoded_dense_and_pruned_in_every_way_and_by_the_library(bench):
    said, records = bench(ONE)
    steps = decoded(records)
    ways = {way for _, way in steps} - {""}
    assert ways == set(options(None, ["--tiny"]).ways)
    own = {(name, way) for name in ("dense", "compact 0.75", "compact 0.5") for way in ways}
    assert set(steps) == own | {("hf", ""), ("hf static compiled", "")}
    for (name, _), record in steps.items():
        if name.startswith("compact"):
            assert record.extra["ceiling"] > 1
            assert record.extra["switch_ms"] > 0
            assert record.extra["byte_share"] == pytest.approx(1 / record.extra["ceiling"])
            assert record.extra["first_s"] > 0
    assert {r.extra["variant"] for r in records if r.name == "gpu_kernels"} == {"dense", "compact 0.75"}
    assert "phi3-mini, 2 layers, 1 × 24\n" in said
    assert "not measured," not in said


def test_rows_decide_together_and_each_for_itself(bench):
    steps = decoded(bench(ROWS)[1])
    shared, own = steps["compact 0.5", "none:auto:1"], steps["rows 0.5", "none:auto:1"]
    assert shared.extra["bytes"] < own.extra["bytes"] < steps["dense", "none:auto:1"].extra["bytes"]


def test_a_cell_that_was_cut_goes_on_with_the_variants_that_it_lacks(bench):
    bench(ONE)
    lines = bench.file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "gpu_cell" not in line and '"compact 0.5"' not in line]
    assert len(kept) < len(lines)
    bench.file.write_text("".join(kept))
    again = bench(ONE, how="--resume")[1][len(kept) :]
    assert {r.extra.get("variant") for r in again} == {"compact 0.5", None}


def test_what_fails_costs_its_own_part_only(bench, monkeypatch):
    step_for = Captured.step_for

    def small(self, batch, length, **options):
        if self.model.attention == "kernel":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_for(self, batch, length, **options)

    monkeypatch.setattr(Captured, "step_for", small)
    said, records = bench(ONE)
    assert "phi3-mini 1 × 24, none:kernel:1: not measured, out of memory\n" in said
    assert {way for _, way in decoded(records)} == {"", "none:auto:1"}
    assert "gpu_cell" not in {r.name for r in records}


def test_units_beside_heads_are_measured_or_refused_in_a_sentence(bench):
    said, records = bench(UNITS)
    names = {name for name, _ in decoded(records)}
    assert names in ({"dense", "head+channel 0.75", "head+channel 0.5"}, set())
    assert bool(names) != ("not supported" in said)


def test_prompts_and_training_are_measured(bench):
    said, records = bench("phi3-mini prompts", "phi3-mini training")
    assert "not measured," not in said
    (looking,) = [r for r in records if r.name == "gpu_looking"]
    assert {"dense_ms", "norms_and_deciding", "looking_and_deciding", "differs"} <= looking.extra.keys()
    (step,) = [r for r in records if r.name == "gpu_training_step"]
    assert step.value > 0
    assert "a training step of 2 × 24 tokens" in said


def test_a_model_of_a_folder_has_its_own_weights(bench):
    steps = decoded(bench("reasoner 1x512")[1])
    assert {r.extra["random_weights"] for (name, way), r in steps.items() if way} == {False}
    assert {name for name, _ in steps} == {"dense", "compact 0.75", "hf", "hf static compiled"}


def test_the_first_kinds_of_cells_fit_in_five_minutes_and_all_in_the_budget():
    every = list(cells(Options(weights={"smollm2": "a", "qwen2.5-coder-0.5b": "b"})))
    names = [cell.name for cell in every]
    assert names[:4] == [ONE, "phi3-mini 8x512", ROWS, UNITS]
    prompts = names.index("phi3-mini prompts")
    assert {"contextual", "smollm2 1x512", "qwen2.5-coder-0.5b 1x512"} == set(names[4:prompts])
    assert sum(cell.cap for cell in every[:prompts]) <= 300
    assert sum(cell.cap for cell in every) <= Options().budget
    assert len(set(names)) == len(names)


def test_a_folder_that_holds_no_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(None, ["--weights", f"smollm2={tmp_path}"])
    assert "give NAME=FOLDER, a folder that holds a config.json" in capsys.readouterr().err


def test_a_step_that_says_something_else_than_masked_execution_is_called_wrong(bench, monkeypatch):
    monkeypatch.setattr("bench.gpu.ours.Masked.apply", lambda *arguments: nullcontext())  # prunes nothing
    said, records = bench("qwen2.5-3b 1x512")
    steps = decoded(records)
    assert steps["dense", "none:auto:1"].extra["apart"] < 1e-5 < steps["compact 0.75", "none:auto:1"].extra["apart"]
    assert "qwen2.5-3b 1 × 24, none:auto:1, compact 0.75: wrong, logits lie" in said
    assert "gpu_cell" not in {r.name for r in records}
