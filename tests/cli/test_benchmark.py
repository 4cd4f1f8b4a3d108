"""`microglia benchmark` on the config of a tiny model: JSON, table, records, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from microglia.cli.benchmark import views
from microglia.cli.main import app
from microglia.cli.options import numbers
from microglia.errors import ConfigError
from microglia.record import read_records
from tests.tiny import tiny_model

QUICK = "--context 8 --new-tokens 2 --num-runs 1".split()


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    tiny_model("phi3").config.save_pretrained(folder)
    return str(folder)


def run(*arguments: str):
    return CliRunner().invoke(app, ["benchmark", *arguments])


def test_json_stands_alone_on_stdout_and_records_are_appended(shape, tmp_path) -> None:
    records = tmp_path / "results" / "tiny.jsonl"
    done = run(
        "--random-weights",
        shape,
        "--layers",
        "1",
        "--keep_ratio",
        "0.75,0.5",
        *QUICK,
        "--output",
        str(records),
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [(row["keep_ratio"], row["variant"]) for row in data["rows"] if row["variant"] != "dense"] == [
        (ratio, variant) for ratio in (0.75, 0.5) for variant in ("masked", "compact", "compact_total")
    ]
    assert data["subject"] == {"model": "tiny", "layers": 1, "weights": "random", "dtype": "bfloat16", "seed": 0}
    assert [record.value for record in read_records(records)] == [row["ms_per_token"] for row in data["rows"]]


def test_the_table_says_what_its_figures_are(shape) -> None:
    done = run("--random-weights", shape, *QUICK, "--keep-ratio", "0.5", "--batch-sizes", "2", "--per-row")
    assert done.exit_code == 0, done.stderr
    for words in (
        "batch 2, context 8, 50% of the heads, decided per row",
        "compact_total",
        "ceiling",
        "share",
        "slicing",
    ):
        assert words in done.stdout


def test_a_share_of_the_bytes_takes_heads_and_channels(shape) -> None:
    executions = ["--executions", "compact,captured"]
    done = run("--random-weights", shape, *QUICK, "--bytes", "0.8,0.6", "--batch-sizes", "2", *executions, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["subject"]["units"] == "head,channel"
    for bytes_share, start in ((0.8, 0), (0.6, 5)):
        rows = data["rows"][start : start + 5]
        assert [row["variant"] for row in rows] == ["dense", "compact", "compact_total", "captured", "captured_total"]
        reached = rows[1]["bytes_per_token"] / rows[0]["bytes_per_token"]
        assert bytes_share <= reached + 1e-6 < bytes_share + 0.07  # of eight heads and eight blocks
        assert {row["keep_ratio"] for row in rows[1:]} == {rows[1]["keep_ratio"]}
    shown = run("--random-weights", shape, *QUICK, "--bytes", "0.6", "--executions", "compact").stdout
    assert "of the units, decided together" in shown


def test_a_share_above_one_is_explained() -> None:
    from types import SimpleNamespace as Values

    from microglia.results import BenchmarkRow, Circumstances

    def row(variant: str, share: float | None):
        integers = dict.fromkeys("batch_size context kv_bytes peak_bytes break_even_tokens n".split(), 1)
        integers |= dict.fromkeys("weight_bytes bytes_per_token prefill_flops step_flops new_tokens".split(), 1)
        reals = "keep_ratio ms_per_token ratio_to_dense ceiling p20 p80 sparsity first_token_ms request_ms".split()
        reals += "request_ratio decision_ms slicing_ms monitoring_ratio".split()
        given = {**integers, **dict.fromkeys(reals, 1.0), "ratio_ci95": (1.0, 1.0), "decides": "together"}
        return BenchmarkRow(variant=variant, realised_share=share, **given)

    def shown(share: float) -> list:
        rows = [row("dense", None), row("masked", 0.0), row("compact", share), row("compact_total", 0.5)]
        about = {"model": "tiny", "layers": 1, "dtype": "bfloat16"}
        return views(Values(rows=rows, subject=about, circumstances=Circumstances(device="cpu")))

    note = "the dense operations did not reach the memory's speed"
    assert note in str(shown(1.2)[-1])
    assert note not in str(shown(0.9)[-1])


def test_numbers_may_be_separated_or_repeated() -> None:
    assert numbers("--batch-sizes", ["1,8", "16"], int) == [1, 8, 16]
    assert numbers("--batch-sizes", None, int) == []
    with pytest.raises(ConfigError, match="--context 1k was given; give numbers"):
        numbers("--context", ["1k"], int)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--random-weights phi4", "'phi4' is no shape"),
        ("--random-weights phi3-mini --layers 99", "phi3-mini has 32, give 1 to that many"),
        ("--random-weights phi3-mini --model-path x", "were both given"),
        ("--keep-ratio many", "--keep-ratio many was given; give numbers"),
        ("--keep-ratio 0.5 --bytes 0.5", "--keep-ratio and --bytes were both given; a budget is one of them"),
        ("--model-path nowhere/", "there is no checkpoint folder nowhere/"),
        ("--batch-sizes 0", "every value must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(arguments: str, sentence: str) -> None:
    done = run(*arguments.split())
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
