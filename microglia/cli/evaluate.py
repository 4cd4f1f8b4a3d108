"""`microglia evaluate`: accuracy and sparsity of a checkpoint, dense against pruned on the same prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from microglia.cli import options as o
from microglia.cli.show import share, side_by_side, table
from microglia.cli.verb import Outcome, progress, verb
from microglia.cli.writing import measured_on, recorder, write_json


@verb()
def evaluate(
    *,
    model_path: o.CheckpointPath = None,
    output_dir: Annotated[Path | None, "Folder for records and answers.", "none"] = None,
    keep_ratio: o.KeepRatio = None,
    bytes: o.Bytes = None,
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
    from microglia.record import append_records

    o.check_output(output_dir)
    task, system = examples.task(), loading.system(model_path)
    with progress("evaluating", "no result was written, start again, with a smaller --limit perhaps") as update:
        result = system.evaluate(
            task,
            **examples.which(),
            **vars(generation),
            keep_ratio=keep_ratio,
            byte_share=bytes,
            dense=dense,
            scoring=scoring,
            progress=update,
        )
    answers = result.answers
    result = replace(result, answers={}, circumstances=measured_on(system.model))
    if output_dir is not None and processes.is_first():
        append_records(output_dir / "records.jsonl", records(result, examples.seed))
        write_json(output_dir / f"evaluation-{examples.dataset}.json", result.to_json())
        write_json(output_dir / f"answers-{examples.dataset}.json", answers)
    return Outcome(result.to_json(), views(result))


def models(result: Any) -> dict[str, Any]:
    """The summaries that there are, dense first."""
    return {name: result[name] for name in ("dense", "pruned") if result[name] is not None}


def records(result: Any, seed: int) -> list[Any]:
    """The measured numbers of an evaluation with their circumstances."""
    from microglia.results import plain

    shared = {name: result[name] for name in ("dataset", "split", "shots", "scoring")}
    record, numbers = recorder(result.circumstances, seed, shared), []
    for name, run in models(result).items():
        numbers.append(record("accuracy", run.accuracy, run.prompts, model=name, ci95=list(run.accuracy_ci95)))
        numbers.append(record("sparsity", run.sparsity, run.prompts, model=name))
    if test := result.paired:
        numbers.append(record("accuracy_difference", test.diff, result.pruned.prompts, **plain(test)))
    return numbers


def views(result: Any) -> list[Any]:
    """A table dense against pruned, one by difficulty and one by family, and the paired difference in a sentence."""
    runs = models(result)
    title = f"{result.dataset}, {result.split}, {result.pruned.prompts} problems"
    whole, *sentence = side_by_side(runs, "pruned minus dense", result.paired, title)
    parts = [whole]
    for kind in ("difficulty", "family"):
        groups = getattr(result.pruned, f"sparsity_by_{kind}")
        accuracies = [getattr(run, f"accuracy_by_{kind}") for run in runs.values()]
        rows = [(group, share(value), *(share(by[group]) for by in accuracies)) for group, value in groups.items()]
        columns = (kind, "sparsity", *(f"accuracy, {name}" for name in runs))
        parts += [table(None, columns, rows, padding=(0, 1))] * (len(groups) > 1)
    return [*parts, *sentence]
