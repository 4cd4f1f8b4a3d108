"""`microglia calibrate`: prune as far as a promise about the accuracy of a checkpoint allows."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.number_lists import numbers
from microglia.cli.verb import Interrupted, Outcome, progress, verb
from microglia.errors import CheckpointError

LEDGER, RECORDS = "calibration-ledger.jsonl", "calibration.jsonl"


@verb
def calibrate(
    *,
    model_path: o.CheckpointPath = None,
    max_drop: Annotated[float, typer.Option("--max-drop", help="Largest accuracy loss, 0.02 is two points.")] = 0.02,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the promise.")] = 0.95,
    keep_ratio: Annotated[
        float | None, typer.Option("--keep-ratio", help="Set the dial to this instead and say what it may lose.")
    ] = None,
    latency_ratio: Annotated[
        float | None, typer.Option("--latency-ratio", help="Or to this: dense time ÷ pruned time of a decode step.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--settings", help="Keep ratios to try.", show_default="0.95,0.9,…,0.3")
    ] = None,
    dataset: o.Dataset = "arithmetic",
    data_dir: o.DataDir = None,
    split: Annotated[str, typer.Option(help="Which part of the data; not the one trained on.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Prompts.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: o.MaxNewTokens = 256,
    path: o.PrunedPath = "compact",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Where the result goes.", show_default="the checkpoint itself")
    ] = None,
    model: o.Model = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> Outcome:
    """Prune as much as is promised to be safe.

    microglia calibrate --model-path checkpoints --max-drop 0.02 --confidence 0.95

    microglia calibrate --model-path checkpoints --latency-ratio 1.1
    """
    from microglia.checkpoint import check_writable
    from microglia.experiments.calibrate import KEEP_RATIOS
    from microglia.record import append_records

    ratios = numbers("--settings", settings, float) or KEEP_RATIOS
    folder = output_dir or Path(model_path or "")
    if output_dir is None and model_path is not None and not folder.is_dir():
        raise CheckpointError(f"{model_path} is no folder to save the result in; say --output-dir FOLDER")
    system = o.load(model_path, model, **o.loading(device, dtype, trust_remote_code))
    check_writable(folder)
    try:
        with progress("answering") as update:
            promise = system.calibrate(
                dataset,
                max_drop=max_drop,
                confidence=confidence,
                keep_ratio=keep_ratio,
                latency_ratio=latency_ratio,
                keep_ratios=ratios,
                split=split,
                limit=limit,
                seed=seed,
                data_dir=data_dir,
                path=path,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                ledger=folder / LEDGER,
                progress=update,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {folder / LEDGER} keeps the finished settings: go on with the same command"
        ) from None
    save(str(model_path), folder, system)
    append_records(folder / RECORDS, records(promise, next(system.model.parameters()).device, seed))
    data = replace(promise, settings={**promise.settings, "output_dir": str(folder)}).to_json()
    return Outcome(data, [*([table(promise)] if promise.tried else []), promise.sentence])


def save(source: str, folder: Path, system: Any) -> None:
    """The checkpoint as it was, but with the chosen threshold and its promise."""
    from microglia.checkpoint import Checkpoint

    saved = Checkpoint.from_pretrained(source)
    config = replace(saved.config, threshold=system.gate.threshold, promise=system.promise)
    replace(saved, config=config).save_pretrained(folder)


def records(promise: Any, device: Any, seed: int) -> list[Any]:
    """One record per setting that was tried."""
    from microglia.record import Record, circumstances

    around = {**circumstances(device), "seed": seed}
    settings = {name: promise.settings[name] for name in ("dataset", "split", "path")}
    settings |= {"confidence": promise.confidence, "max_drop": promise.max_drop}
    return [
        Record(
            "accuracy_drop",
            tried.drop,
            "ratio",
            n=promise.prompts,
            extra={**settings, **asdict(tried), "chosen": tried.threshold == promise.threshold},
            **around,
        )
        for tried in promise.tried
    ]


def table(promise: Any) -> Table:
    """One line per setting, gentlest first."""
    title = f"{promise.prompts} prompts, dense {promise.dense_accuracy:.1%} right"
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("heads kept", "right", "lost", "won", "drop", f"limit, {promise.confidence:.0%}", ""):
        view.add_column(name, justify="right", no_wrap=True)
    for tried in promise.tried:
        view.add_row(
            f"{tried.keep_ratio:.1%}",
            f"{tried.accuracy:.1%}",
            str(tried.lost),
            str(tried.won),
            f"{100 * tried.drop:+.1f}",
            f"{100 * tried.drop_bound:+.1f}",
            "chosen" if tried.threshold == promise.threshold else "",
        )
    return view
