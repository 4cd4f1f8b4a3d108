"""`microglia benchmark`: time and memory dense, masked and compacted, beside the best that the pattern allows."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.show import interval, share, table
from microglia.cli.verb import Outcome, progress, verb
from microglia.errors import ConfigError

MIB = 2**20
SHAPES = "Without a checkpoint: phi3-mini, qwen2.5-3b, llama3-8b, reasoner, or a folder with a config.json."
DEFAULT_SHAPE, DEFAULT_LAYERS = "phi3-mini", 4  # bound by memory like the whole model, and fits a small machine
TEXTS = 2000  # problems of the arithmetic task that a checkpoint is timed on: some 100,000 tokens


@verb()
def benchmark(
    *,
    model_path: o.CheckpointPath = None,
    random_weights: Annotated[str | None, SHAPES, "phi3-mini, 4 layers"] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of its layers.", show_default="all")] = None,
    keep_ratio: Annotated[o.Many, "One or several keep ratios: 0.75,0.5.", "0.75, or as the checkpoint decides"] = None,
    bytes: Annotated[o.Many, "Or shares of a dense step's bytes; of random weights channels go too.", "none"] = None,
    batch_sizes: Annotated[o.Many, "Batch sizes: 1,8.", "1"] = None,
    context: Annotated[o.Many, "Lengths of the prompt in tokens.", "128,1024"] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer in tokens.")] = 64,
    num_runs: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 20,
    executions: Annotated[o.Many, "What is timed beside dense: masked,compact,captured.", "masked,compact"] = None,
    per_row: Annotated[bool, "Each row of a batch decides for itself."] = False,
    output: Annotated[Path | None, "File of records to append to, e.g. results/cpu.jsonl.", "none"] = None,
    seed: o.Seed = 0,
    loading: Annotated[o.Loading, Fields(defaults={"dtype": "bfloat16 for random weights"})],
) -> Outcome:
    """Measure latency and memory, each beside its ceiling.

    microglia benchmark --model-path checkpoints --batch-sizes 1,8

    microglia benchmark --random-weights phi3-mini --layers 4 --bytes 0.75,0.5
    """
    from microglia.benchmark import RANDOM_UNITS, Plan, records
    from microglia.benchmark import benchmark as measure
    from microglia.record import append_records

    if model_path is not None and random_weights is not None:
        raise ConfigError("--model-path and --random-weights were both given; a benchmark measures one of them")
    o.check_output(output and output.parent)
    ratios: list[Any] = o.numbers("--keep-ratio", keep_ratio, float)
    shares = o.numbers("--bytes", bytes, float)
    if ratios and shares:
        raise ConfigError("--keep-ratio and --bytes were both given; a budget is one of them")
    plan = Plan(
        batch_sizes=o.numbers("--batch-sizes", batch_sizes, int) or (1,),
        contexts=o.numbers("--context", context, int) or (128, 1024),
        keep_ratios=ratios or ([] if shares else [0.75] if model_path is None else [None]),
        byte_shares=shares,
        new_tokens=new_tokens,
        num_runs=num_runs,
        executions=("dense", *o.names(executions or ["masked,compact"])),
    )
    if model_path is None:
        lm, subject, about = of_shape(random_weights, layers, loading.arguments(), per_row, seed)
    else:
        lm, subject, about = of_checkpoint(model_path, loading, per_row, seed)
    about |= {"dtype": str(lm.dtype).removeprefix("torch."), "seed": seed}
    if model_path is None and shares:
        about["units"] = ",".join(RANDOM_UNITS)
    if loading.quantize is not None:
        about["dtype"] += f", weights {loading.quantize}"
    with progress("measuring") as update:
        report = measure(lm, subject, plan, about, update)
    if output is not None:
        append_records(output, records(report))
    return Outcome(report.to_json(), views(report))


def of_shape(shape: str | None, layers: int | None, how: dict[str, Any], per_row: bool, seed: int) -> tuple:
    """Model, subject and description for random weights."""
    import torch

    from microglia.anatomy import Anatomy
    from microglia.benchmark import random_model, random_subject
    from microglia.models import quantise

    if shape is None:
        shape, layers = DEFAULT_SHAPE, layers or DEFAULT_LAYERS
    device = how["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = random_model(shape, layers=layers, dtype=getattr(torch, how["dtype"] or "bfloat16"), device=device, seed=seed)
    if how["quantize"] is not None:
        quantise(lm, how["quantize"])
    subject = random_subject(lm, per_row=per_row, seed=seed)
    name = Path(shape).name  # a folder's place says something about a machine, not about a model
    return lm, subject, {"model": name, "layers": len(Anatomy(lm).layers), "weights": "random"}


def of_checkpoint(folder: str, loading: o.Loading, per_row: bool, seed: int) -> tuple:
    """Model, subject and description for a trained checkpoint, on arithmetic problems."""
    from microglia.anatomy import Anatomy
    from microglia.benchmark import text_subject
    from microglia.tasks.arithmetic import ArithmeticTask

    system = loading.system(folder)
    texts = [x.question + "\n" + x.answer for x in ArithmeticTask().load("test", limit=TEXTS, seed=seed)]
    subject = text_subject(system.pruner, system.tokenizer, texts, per_row=per_row)
    anatomy, name = Anatomy(system.model), system.checkpoint().config.base_model
    about = {"model": name, "layers": len(anatomy.layers), "weights": Path(folder).name}
    if system.pruner.units != ("head",):
        about["units"] = ",".join(system.pruner.units)
    return anatomy.lm, subject, about


def views(report: Any) -> list[Any]:
    """One table per batch size, context and keep ratio, each with what its figures need to be read."""
    about = report.subject
    parts: list[Any] = [f"{about['model']}, {about['layers']} layers, {about['dtype']}, {report.circumstances.device}"]
    starts = [place for place, row in enumerate(report.rows) if row.variant == "dense"]
    for start, end in pairwise([*starts, len(report.rows)]):
        rows = report.rows[start:end]
        totals = [summary(rows[0], row) for row in rows if row.variant.endswith("_total")]
        parts += ["", variants(rows, "units" if "units" in about else "heads"), *totals]
    parts += [
        "",
        "speed-up: dense time ÷ this time, median of interleaved pairs. ceiling: its best possible value, by bytes.",
        "share: of the time that could be saved, what was.",
    ]
    if any((row.realised_share or 0) > 1 for row in report.rows):
        parts.append("* above 100 %: the dense operations did not reach the memory's speed themselves.")
    return parts


def variants(timings: Sequence[Any], units: str) -> Any:
    """The variants of one combination."""
    rows = []
    for row in timings:
        realised = "" if row.realised_share is None else share(row.realised_share, 0) + "*" * (row.realised_share > 1)
        ends = interval(row.ratio_ci95, "{:.3f}", 1, "–")
        speed = [f"{row.ratio_to_dense:.3f}", ends, f"{row.ceiling:.3f}", realised]
        memory = [f"{row.kv_bytes / MIB:,.1f}", "" if row.peak_bytes is None else f"{row.peak_bytes / MIB:,.0f}"]
        speed = [""] * len(speed) if row.variant == "dense" else speed
        rows.append([row.variant, f"{row.ms_per_token:.2f}", *speed, *memory])
    kept = f"{share(row.keep_ratio, 0)} of the {units}, decided {row.decides}"
    title = f"batch {row.batch_size}, context {row.context:,}, {kept}"
    return table(title, ("", "ms/token", "speed-up", "95 %", "ceiling", "share", "KV MiB", "peak MiB"), rows)


def summary(dense: Any, total: Any) -> str:
    """What the table has no column for, of a variant with its decision."""
    paid = f"paid back after {total.break_even_tokens} tokens" if total.break_even_tokens else "never paid back"
    return (
        f"{total.variant.removesuffix('_total')}: decision {total.decision_ms:.1f} ms and slicing "
        f"{total.slicing_ms:.1f} ms, {paid}\n"
        f"prompt: {dense.first_token_ms:.0f} ms dense, monitoring {total.monitoring_ratio - 1:+.1%}; request of "
        f"{total.new_tokens} new tokens: {dense.request_ms:.0f} ms dense, {total.request_ms:.0f} ms pruned\n"
        f"a step reads {dense.bytes_per_token / MIB:,.0f} MiB dense, {total.bytes_per_token / MIB:,.0f} MiB pruned; "
        f"computes {dense.step_flops / 1e9:.2f} and {total.step_flops / 1e9:.2f} GFLOP"
    )
