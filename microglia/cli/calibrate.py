"""`microglia calibrate`: prune as far as a promise about the accuracy of a checkpoint allows."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.number_lists import numbers
from microglia.cli.verb import GO_ON, Outcome, progress, verb
from microglia.errors import CheckpointError

LEDGER, RECORDS = "calibration-ledger.jsonl", "calibration.jsonl"


Examples = Annotated[o.Examples, Fields(without=("shots", "question_field", "answer_field"))]


@verb()
def calibrate(
    *,
    model_path: o.CheckpointPath = None,
    max_drop: Annotated[float, "Largest loss of accuracy; 0.02 is two points."] = 0.02,
    confidence: Annotated[float, "Confidence of the promise."] = 0.95,
    keep_ratio: Annotated[
        float | None, "Set this keep ratio instead, and say what it may lose.", "by the promise"
    ] = None,
    latency_ratio: Annotated[
        float | None, "Or reach this speed-up of a decode step, dense time divided by pruned time.", "by the promise"
    ] = None,
    settings_to_try: Annotated[
        o.Many, typer.Option("--settings", help="Keep ratios to try.", show_default="0.95,0.9,…,0.3")
    ] = None,
    output_dir: Annotated[Path | None, "Folder for the result.", "the checkpoint itself"] = None,
    examples: Examples = o.Examples(split="validation"),
    generation: o.Generation,
    loading: o.Unquantised,
) -> Outcome:
    """Prune as much as a promise about the accuracy allows.

    microglia calibrate --model-path checkpoints --max-drop 0.02 --confidence 0.95

    microglia calibrate --model-path checkpoints --latency-ratio 1.1
    """
    from microglia.checkpoint import check_writable
    from microglia.experiments.calibrate import KEEP_RATIOS
    from microglia.record import append_records

    ratios = numbers("--settings", settings_to_try, float) or KEEP_RATIOS
    folder = output_dir or Path(model_path or "")
    if output_dir is None and model_path is not None and not folder.is_dir():
        raise CheckpointError(f"{model_path} is no folder to save the result in; say --output-dir FOLDER")
    system = loading.system(model_path)
    check_writable(folder)
    with progress("answering", f"{folder / LEDGER} keeps the finished settings: {GO_ON}") as update:
        promise = system.calibrate(
            examples.dataset,
            max_drop=max_drop,
            confidence=confidence,
            keep_ratio=keep_ratio,
            latency_ratio=latency_ratio,
            keep_ratios=ratios,
            **examples.which(),
            **generation.how(),
            ledger=folder / LEDGER,
            progress=update,
        )
    save(str(model_path), folder, system)
    append_records(folder / RECORDS, records(promise, next(system.model.parameters()).device, examples.seed))
    data = replace(promise, settings={**promise.settings, "output_dir": str(folder)}).to_json()
    return Outcome(data, [*([table(promise)] if promise.tried else []), promise.sentence])


def save(source: str, folder: Path, system: Any) -> None:
    """The checkpoint as it was, but with the chosen threshold and its promise."""
    from microglia.checkpoint import Checkpoint

    Checkpoint.from_pretrained(source).calibrated(system.pruner, system.promise).save_pretrained(folder)


def records(promise: Any, device: Any, seed: int) -> list[Any]:
    """One record per setting that was tried."""
    from microglia.record import Record, circumstances

    around = {**circumstances(device), "seed": seed}
    settings = {name: promise.settings[name] for name in ("dataset", "split", "execution")}
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
