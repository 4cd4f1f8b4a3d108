"""`microglia evaluate`: accuracy and sparsity of a checkpoint, dense against pruned on the same prompts."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table

from microglia.cli import options as o
from microglia.cli.verb import Outcome, progress, verb


@verb()
def evaluate(
    *,
    model_path: o.CheckpointPath = None,
    output_dir: Annotated[Path | None, "Folder for records and answers.", "none"] = None,
    keep_ratio: o.KeepRatio = None,
    scoring: Annotated[
        Literal["generation", "likelihood", "likelihood-per-character"],
        "Judge generated answers, or the likelihood of each choice.",
    ] = "generation",
    dense: Annotated[bool, "Answer with the dense model too."] = True,
    examples: o.Examples,
    generation: o.Generation,
    loading: o.Loading,
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
    task, system = examples.task(), loading.system(model_path)
    with progress("evaluating", "no result was written, start again, with a smaller --limit perhaps") as update:
        result = system.evaluate(
            task,
            **examples.which(),
            **generation.how(),
            keep_ratio=keep_ratio,
            dense=dense,
            scoring=scoring,
            progress=update,
        )
    answers = result.answers
    made = circumstances(next(system.model.parameters()).device)
    result = replace(result, answers={}, circumstances=Circumstances(**made))
    if output_dir is not None and processes.is_first():
        append_records(output_dir / "records.jsonl", records(result, examples.seed))
        _write(output_dir / f"evaluation-{examples.dataset}.json", result.to_json())
        _write(output_dir / f"answers-{examples.dataset}.json", answers)
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
