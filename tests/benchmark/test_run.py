"""A whole benchmark of a tiny model: its rows, its JSON, its records, and that the model comes back unchanged."""

import gc
import json
import mmap
from dataclasses import replace

import pytest
import torch

from microglia.benchmark import (
    SHAPES,
    Plan,
    Prompted,
    benchmark,
    random_model,
    random_subject,
    records,
    text_subject,
)
from microglia.benchmark.memory import peak_bytes, reset_peak
from microglia.benchmark.shapes import shape_config
from microglia.errors import ConfigError, DataError
from microglia.execution import Captured, Compact
from microglia.gate import Gate, keep_ratio
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.record import append_records, read_records
from microglia.results import from_json
from microglia.units import HeadSite, find_sites
from tests.tiny import tiny_model

PLAN = Plan(batch_sizes=(1, 2), contexts=(16,), keep_ratios=(0.5,), new_tokens=3, num_runs=2)
WANTED = set(
    "variant batch_size context keep_ratio ms_per_token ratio_to_dense ceiling realised_share kv_bytes peak_bytes "
    "break_even_tokens".split()
)


@pytest.fixture(scope="module", params=[False, True], ids=["together", "per row"])
def report(request):
    model = tiny_model("phi3")
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    found = benchmark(model, random_subject(model, per_row=request.param), PLAN, {"model": "tiny", "seed": 0})
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    return found


def test_every_combination_has_its_four_variants(report) -> None:
    assert [(row.batch_size, row.variant) for row in report.rows] == [
        (batch, variant) for batch in (1, 2) for variant in ("dense", "masked", "compact", "compact_total")
    ]


def test_the_json_has_the_promised_shape(report) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"kind", "rows", "circumstances"} <= data.keys()
    assert {"device", "command", "versions"} <= data["circumstances"].keys()
    assert report.circumstances.commit == data["circumstances"].get("commit")
    assert from_json(data) == report
    for row in data["rows"]:
        assert row.keys() >= WANTED


def test_memory_goes_down_by_the_pruned_share_and_only_where_heads_are_gone(report) -> None:
    for start in (0, 4):
        dense, masked, compact, total = report.rows[start : start + 4]
        assert masked.kv_bytes == dense.kv_bytes
        assert compact.kv_bytes == total.kv_bytes == dense.kv_bytes // 2
        assert masked.bytes_per_token == dense.bytes_per_token == dense.weight_bytes + dense.kv_bytes
        assert compact.bytes_per_token < dense.bytes_per_token
        assert compact.step_flops < dense.step_flops == masked.step_flops
        assert compact.sparsity == compact.keep_ratio == 0.5


def test_the_ceiling_is_dense_bytes_over_compact_bytes(report) -> None:
    for start in (0, 4):
        dense, masked, compact, total = report.rows[start : start + 4]
        assert dense.ceiling == dense.ratio_to_dense == 1
        assert dense.realised_share is None
        assert masked.ceiling == compact.ceiling == total.ceiling == dense.bytes_per_token / compact.bytes_per_token
        share = (1 - 1 / compact.ratio_to_dense) / (1 - 1 / compact.ceiling)
        assert compact.realised_share == pytest.approx(share)
        assert compact.decision_ms > 0
        assert compact.slicing_ms > 0
        assert total.p80 > 0


def test_rows_that_decide_for_themselves_are_told_from_those_that_agree(report) -> None:
    alone, batch = report.rows[2], report.rows[6]
    assert alone.decides == "together"
    dense = report.rows[4]
    assert (batch.weight_bytes == dense.weight_bytes) == (batch.decides == "per row")


def test_records_carry_the_row_and_its_circumstances(report, tmp_path) -> None:
    append_records(tmp_path / "records.jsonl", records(report))
    written = read_records(tmp_path / "records.jsonl")
    assert [r.extra["variant"] for r in written] == [row.variant for row in report.rows]
    for record, row in zip(written, report.rows, strict=True):
        assert (record.name, record.unit, record.value) == ("decode_latency", "ms", row.ms_per_token)
        assert record.command
        assert record.device
        assert record.extra["ceiling"] == row.ceiling


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(letter) % 90 + 2 for letter in text]}


def test_a_pruner_is_measured_on_text_at_the_budget_that_it_is_given() -> None:
    model = tiny_model("llama")
    geometries = [site.geometry for site in find_sites(model)]
    policy = StaticPolicy.random(geometries, seed=0)
    logits = [x.detach()[None] for x in policy.logits]
    pruner = Pruner(policy, Gate(threshold=-1.0, bucket=1)).with_budget(logits, geometries)
    subject = text_subject(pruner, Letters(), ["How many?", "Seven are left."], per_row=True)
    together, apart = subject(1, 8, None), subject(2, 8, 0.5)
    assert together.pruner is pruner
    assert apart.pruner.gate == pruner.at(0.5).gate
    assert keep_ratio(apart.pruner.keep(logits, geometries)).tolist() == [0.5]
    assert not torch.equal(*apart.ids)
    plan = Plan(batch_sizes=(2,), contexts=(8,), keep_ratios=(None,), new_tokens=2, num_runs=1)
    rows = benchmark(model, subject, plan, {}).rows
    assert [row.keep_ratio for row in rows] == [1.0] * 4
    assert rows[2].realised_share is None
    with pytest.raises(DataError, match="2 prompts of 100 tokens were asked for"):
        subject(2, 100, None)


@pytest.mark.parametrize("per_row", [False, True])
def test_any_execution_takes_part(per_row: bool) -> None:
    model = tiny_model("phi3")
    captured = Captured(model, block=1)
    plan = Plan((2,), (16,), (0.5,), new_tokens=3, num_runs=2, executions=("dense", "compact", captured))
    rows = benchmark(model, random_subject(model, per_row=per_row), plan, {}).rows
    assert [row.variant for row in rows] == ["dense", "compact", "compact_total", "captured", "captured_total"]
    dense, compact, _, replayed, total = rows
    for row in (replayed, total):  # the static cache is reserved for every head, a step reads those that are kept
        assert row.kv_bytes > dense.kv_bytes > compact.kv_bytes
        assert row.bytes_per_token == compact.bytes_per_token
        assert (row.ceiling, row.keep_ratio, row.step_flops) == (compact.ceiling, 0.5, compact.step_flops)
    assert replayed.slicing_ms > 0
    before = captured.captures
    benchmark(model, random_subject(model, per_row=per_row), plan, {})
    assert captured.captures == before


def test_what_pruned_heads_leave_behind_is_measured_too(monkeypatch) -> None:
    biased = []
    fill_bias = HeadSite.fill_bias
    monkeypatch.setattr(HeadSite, "fill_bias", lambda *args: biased.append(1) or fill_bias(*args))
    model = tiny_model("qwen2")

    def subject(batch, context, ratio):
        prompted = random_subject(model)(batch, context, ratio)
        return Prompted(prompted.ids, replace(prompted.pruner, fill="mean"))

    plan = Plan((1,), (16,), (0.5,), new_tokens=3, num_runs=1)
    rows = benchmark(model, subject, plan, {}).rows
    assert [row.variant for row in rows] == ["dense", "masked", "compact", "compact_total"]
    assert len(biased) == 2 * 2 * 2  # sites, with one repetition to warm up, of requests and of bursts


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_built_in_the_type_asked_for(shape: str, monkeypatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 100, "pad_token_id": 0, "head_dim": 4}
    monkeypatch.setitem(SHAPES, shape, {**SHAPES[shape], **small})
    model = random_model(shape, layers=2, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(find_sites(model)) == 2
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (shape == "qwen2.5-3b")
    assert model.model.rotary_emb.inv_freq[0] == 1  # a buffer, which the meta device leaves empty
    with torch.inference_mode():
        logits = model(torch.arange(5)[None]).logits
    assert bool(logits.isfinite().all())
    assert logits.std() > 0
    whole = shape_config(shape)
    assert find_sites(model)[0].geometry.heads == whole.num_attention_heads


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shape_config("phi4"), "'phi4' is no shape; give phi3-mini"),
        (lambda: shape_config("phi3-mini", 33), "layers=33 was given; phi3-mini has 32"),
        (lambda: Plan(keep_ratios=()), "keep_ratios is empty"),
        (lambda: Plan(contexts=(0,)), "every value must be at least 1"),
        (lambda: Plan(new_tokens=1), "new_tokens=1"),
        (lambda: Plan(executions=("masked",)), "executions=masked was given; name each once, and dense"),
        (lambda: Plan(executions=("dense", "compact", Compact())), "executions=dense,compact,compact was given"),
        (lambda: benchmark(tiny_model("phi3"), None, Plan(executions=("dense", "quick")), {}), "execution='quick'"),
        (lambda: random_subject(tiny_model("phi3"))(1, 8, None), "give keep_ratio"),
        (lambda: random_subject(tiny_model("phi3"))(1, 8, byte_share=0.1), "bytes=0.1 was given; .* at least 0.2"),
        (lambda: random_subject(tiny_model("phi3"))(1, 8, 1.5), "keep_ratio=1.5 was given"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_peak_of_memory_sees_what_was_freed_again() -> None:
    device = torch.device("cpu")
    gc.collect()  # what other tests left behind must not be freed in between
    reset_peak(device)
    before = peak_bytes(device)
    if before is None:
        pytest.skip("this system does not tell the peak of a process")
    with mmap.mmap(-1, 50 * 2**20) as pages:  # a tensor might fit into what the allocator holds already
        for first in range(0, len(pages), mmap.PAGESIZE):
            pages[first] = 1
    after = peak_bytes(device)
    assert 40 * 2**20 < after - before < 80 * 2**20
    reset_peak(device)
    assert peak_bytes(device) < after
