"""`microglia evaluate`: a checkpoint on one or several data sets, dense beside pruned on the same prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.show import figures_table, share, side_by_side, table
from microglia.cli.verb import GO_ON, Outcome, progress, verb
from microglia.cli.writing import measured_on, recorder, write_json
from microglia.errors import ConfigError

LEDGER = "evaluation-ledger.jsonl"
SAID = "no result was written, start again, with a smaller --limit or with --output-dir, which keeps what is done"
Examples = Annotated[o.Examples, Fields(without=("limit",))]


@verb()
def evaluate(
    *,
    model_path: o.ShippedOrPath = None,
    output_dir: Annotated[Path | None, "Folder for records, answers and finished batches.", "none"] = None,
    ledger: Annotated[
        Path | None, "File of finished batches; checkpoints that share one share the dense answers.", "in --output-dir"
    ] = None,
    keep_ratio: o.KeepRatio = None,
    bytes: o.Bytes = None,
    scoring: Annotated[
        Literal["generation", "likelihood", "likelihood-per-character", "text"] | None,
        "Judge generated answers, the likelihood of each choice, or how close texts stay to the dense model.",
        "as the task is",
    ] = None,
    dense: Annotated[bool, "Answer with the dense model too."] = True,
    limit: Annotated[str | None, "Number of examples; of several data sets as 400,600,64.", "all"] = None,
    examples: Examples,
    generation: o.Generation,
    loading: o.Loading,
) -> Outcome:
    """Compare the pruned with the dense model on the same problems, of one or several data sets.

    microglia evaluate --model-path checkpoints --dataset arithmetic --limit 500 --output-dir results

    microglia evaluate --model-path checkpoints --dataset gsm8k,arc-easy,text --limit 400,600,64 --data-dir data
    """
    from microglia import processes
    from microglia.experiments.judge import together
    from microglia.record import append_records

    o.check_output(output_dir)
    parts = each(examples, limit)
    tasks, system = [part.task() for part in parts], loading.system(loading.checkpoint(model_path))
    file = ledger or (None if output_dir is None else output_dir / LEDGER)
    with progress("evaluating", f"{file} keeps the finished batches: {GO_ON}" if file else SAID) as update:
        results = {
            part.dataset: system.evaluate(
                task,
                **part.which(),
                **vars(generation),
                keep_ratio=keep_ratio,
                byte_share=bytes,
                dense=dense,
                scoring=scoring,
                ledger=file,
                progress=update,
            )
            for part, task in zip(parts, tasks, strict=True)
        }
    made = measured_on(system.model)
    answers = {name: getattr(result, "answers", {}) for name, result in results.items()}
    details = {name: replace(r, answers={}) if answers[name] else r for name, r in results.items()}
    result = replace(next(iter(details.values())) if len(details) == 1 else together(details), circumstances=made)
    if output_dir is not None and processes.is_first():
        append_records(output_dir / "records.jsonl", records(result, examples))
        write_json(output_dir / f"{result.kind}-{'-'.join(details)}.json", result.to_json())
        for name, rows in answers.items():
            if rows:
                write_json(output_dir / f"answers-{name}.json", rows)
    return Outcome(result.to_json(), views(result, generation.max_new_tokens))


def each(examples: Any, limit: str | None) -> list[Any]:
    """The examples of every data set that is named, each with its limit and, of several, its folder in --data-dir.

    Raises ConfigError for a data set that is named twice, and for limits that do not fit.
    """
    names, limits = o.names([examples.dataset]), o.numbers("--limit", None if limit is None else [limit], int)
    if len(limits) not in (0, 1, len(names)) or len({*names}) < len(names):
        raise ConfigError(
            f"--dataset {examples.dataset} and --limit {limit} were given; name every data set once, and give one "
            "limit or one for each"
        )
    several = len(names) > 1
    return [
        replace(
            examples,
            dataset=name,
            limit=(limits * len(names) if len(limits) == 1 else limits or [None] * len(names))[place],
            data_dir=folder_of(examples.data_dir, name) if several else examples.data_dir,
        )
        for place, name in enumerate(names)
    ]


def folder_of(data_dir: Path | None, name: str) -> Path | None:
    """The folder of one of several data sets: `gsm8k`, or `arc` for arc-easy; None, its usual source, without one."""
    places = [] if data_dir is None else [data_dir / name, data_dir / name.partition("-")[0]]
    return next((place for place in places if place.exists()), None)


def models(result: Any) -> dict[str, Any]:
    """The summaries that there are, dense first."""
    return {name: result[name] for name in ("dense", "pruned") if result[name] is not None}


def records(result: Any, examples: Any) -> list[Any]:
    """The measured numbers of an evaluation, or of several data sets, with their circumstances."""
    from microglia.results import plain

    numbers = list[Any]()
    for one in [result] if result.kind == "evaluation" else result.evaluations.values():
        shared = {name: one[name] for name in ("dataset", "split", "shots", "scoring")}
        record = recorder(result.circumstances, examples.seed, shared)
        for name, run in models(one).items():
            numbers.append(record("accuracy", run.accuracy, run.prompts, model=name, ci95=list(run.accuracy_ci95)))
            numbers.append(record("sparsity", run.sparsity, run.prompts, model=name))
        if test := one.paired:
            numbers.append(record("accuracy_difference", test.diff, one.pruned.prompts, **plain(test)))
    for figure in result.figures:
        if figure.measure in UNITS:
            shared = {"dataset": figure.dataset, "split": examples.split, "dense": figure.dense}
            record = recorder(result.circumstances, examples.seed, shared, UNITS[figure.measure])
            difference = {} if figure.difference is None else plain(figure.difference)
            numbers.append(record(figure.measure, figure.pruned, figure.prompts, **difference))
    return numbers


UNITS = {
    "unfinished": "ratio",
    "kl": "nats/token",
    "top1": "ratio",
    "perplexity": "perplexity",
    "exact_prefix": "tokens",
    "same": "ratio",
}


def views(result: Any, max_new_tokens: int) -> list[Any]:
    """One table of all figures; of a single data set also one by difficulty and by family, and a sentence."""
    figures = figures_table(result.figures, f"greedy answers, cut off at {max_new_tokens} tokens; p is McNemar's")
    if result.kind != "evaluation":
        return [figures]
    runs = models(result)
    title = f"{result.dataset}, {result.split}, {result.pruned.prompts} problems"
    whole, *sentence = side_by_side(runs, "pruned minus dense", result.paired, title)
    parts = [whole, figures] if len(result.figures) > len(("accuracy", "keep_ratio")) else [whole]
    for kind in ("difficulty", "family"):
        groups = getattr(result.pruned, f"sparsity_by_{kind}")
        accuracies = [getattr(run, f"accuracy_by_{kind}") for run in runs.values()]
        rows = [(group, share(value), *(share(by[group]) for by in accuracies)) for group, value in groups.items()]
        columns = (kind, "sparsity", *(f"accuracy, {name}" for name in runs))
        parts += [table(None, columns, rows, padding=(0, 1))] * (len(groups) > 1)
    return [*parts, *sentence]
