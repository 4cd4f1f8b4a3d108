"""`microglia evaluate`: accuracy and sparsity of a checkpoint, dense against pruned on the same prompts."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.verb import Interrupted, Outcome, progress, verb


@verb
def evaluate(
    *,
    model_path: o.CheckpointPath = None,
    dataset: o.Dataset = "arithmetic",
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Folder for records and answers.")] = None,
    data_dir: o.DataDir = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Examples.", show_default="all")] = None,
    shots: o.Shots = 0,
    scoring: Annotated[
        str, typer.Option(help="generation; likelihood or likelihood-per-character of the choices.")
    ] = "generation",
    question_field: o.QuestionField = None,
    answer_field: o.AnswerField = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: o.MaxNewTokens = 256,
    path: o.PrunedPath = "compact",
    keep_ratio: o.KeepRatio = None,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Answer with the dense model too.")] = True,
    model: o.Model = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> Outcome:
    """Compare the pruned with the dense model on the same problems.

    microglia evaluate --model-path checkpoints --dataset arithmetic --limit 500 --output-dir results
    """
    from microglia import processes
    from microglia.checkpoint import check_writable
    from microglia.record import append_records, circumstances
    from microglia.results import Circumstances

    if output_dir is not None:
        check_writable(output_dir)
    task = o.task(dataset, shots, question_field, answer_field)
    system = o.load(model_path, model, **o.loading(device, dtype, trust_remote_code, quantize))
    try:
        with progress("evaluating") as update:
            result = system.evaluate(
                task,
                split=split,
                limit=limit,
                seed=seed,
                data_dir=data_dir,
                path=path,
                keep_ratio=keep_ratio,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                dense=dense,
                scoring=scoring,
                progress=update,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; no result was written, start again, with a smaller --limit perhaps") from None
    answers = result.answers
    made = circumstances(next(system.model.parameters()).device)
    result = replace(result, answers={}, circumstances=Circumstances(**made))
    if output_dir is not None and processes.is_first():
        append_records(output_dir / "records.jsonl", records(result, seed))
        _write(output_dir / f"evaluation-{dataset}.json", result.to_json())
        _write(output_dir / f"answers-{dataset}.json", answers)
    return Outcome(result.to_json(), views(result))


def models(result: Any) -> dict[str, Any]:
    """The summaries that there are, dense first."""
    return {name: result[name] for name in ("dense", "pruned") if result[name] is not None}


def records(result: Any, seed: int) -> list[Any]:
    """The measured numbers of an evaluation with their circumstances."""
    from microglia.record import Record
    from microglia.results import plain

    around = {**asdict(result.circumstances), "seed": seed}
    settings = {name: result[name] for name in ("dataset", "split", "shots", "scoring")}
    numbers = []
    for name, run in models(result).items():
        extra = {"model": name, **settings}
        interval = {"ci95": list(run.accuracy_ci95)}
        numbers.append(Record("accuracy", run.accuracy, "ratio", n=run.prompts, extra={**extra, **interval}, **around))
        numbers.append(Record("sparsity", run.sparsity, "ratio", n=run.prompts, extra=extra, **around))
    if pair := result.paired:
        extra, n = {**settings, **plain(pair)}, result.pruned.prompts
        numbers.append(Record("accuracy_difference", pair.diff, "ratio", n=n, extra=extra, **around))
    return numbers


def views(result: Any) -> list[Any]:
    """A table dense against pruned, one by difficulty, and the paired difference in a sentence."""
    runs = models(result)
    table = Table("", *runs, title=f"{result.dataset}, {result.split}, {result.pruned.prompts} problems")
    accuracies = [f"{r.accuracy:.1%} ({_interval(r.accuracy_ci95)})" for r in runs.values()]
    table.add_row("accuracy (95 % interval)", *accuracies)
    table.add_row("sparsity", *(f"{r.sparsity:.1%}" for r in runs.values()))
    table.add_row("tokens per answer", *(f"{r.mean_tokens:.1f}" for r in runs.values()))
    table.add_row("seconds", *(f"{r.seconds:.1f}" for r in runs.values()))
    parts: list[Any] = [table]
    for key in ("difficulty", "family"):
        groups = getattr(result.pruned, f"sparsity_by_{key}")
        by = Table(key, "sparsity", *(f"accuracy, {name}" for name in runs))
        for group, sparsity in groups.items():
            accuracies = [f"{getattr(r, f'accuracy_by_{key}')[group]:.1%}" for r in runs.values()]
            by.add_row(group, f"{sparsity:.1%}", *accuracies)
        if len(groups) > 1:
            parts.append(by)
    if pair := result.paired:
        points = [100 * value for value in (pair.diff, *pair.ci95)]
        parts.append(
            f"pruned minus dense: {points[0]:+.1f} points, 95 % interval {points[1]:+.1f} to {points[2]:+.1f}, "
            f"McNemar p = {pair.p_value:.3g}"
        )
    return parts


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1%} to {ends[1]:.1%}"


def _write(path: Path, value: Any) -> None:
    from microglia.checkpoint import write_atomically
    from microglia.errors import MicrogliaError

    try:
        write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise MicrogliaError(f"{path} cannot be written ({error.strerror}); give another --output-dir") from error
