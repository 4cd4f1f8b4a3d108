"""`microglia calibrate`: prune as far as a promise about the accuracy of a checkpoint allows."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.show import points, share, table
from microglia.cli.verb import GO_ON, Outcome, progress, verb
from microglia.cli.writing import measured_on, recorder
from microglia.errors import CheckpointError

LEDGER, RECORDS = "calibration-ledger.jsonl", "calibration.jsonl"
TO_TRY = "Keep ratios to try."
Examples = Annotated[o.Examples, Fields(without=("shots", "question_field", "answer_field"))]


@verb()
def calibrate(
    *,
    model_path: o.CheckpointPath = None,
    max_drop: Annotated[float, "Largest loss of accuracy; 0.02 is two points."] = 0.02,
    confidence: Annotated[float, "Confidence of the promise."] = 0.95,
    keep_ratio: Annotated[float | None, "Set this one instead, and say what it may lose.", "by the promise"] = None,
    latency_ratio: Annotated[float | None, "Or reach this: dense time ÷ time of a step.", "by the promise"] = None,
    settings_to_try: Annotated[o.Many, typer.Option("--settings", help=TO_TRY, show_default="0.95,0.9,…,0.3")] = None,
    output_dir: Annotated[Path | None, "Folder for the result.", "the checkpoint itself"] = None,
    examples: Examples = o.Examples(split="validation"),
    generation: o.Generation,
    loading: o.Unquantised,
) -> Outcome:
    """Prune as much as a promise about the accuracy allows.

    microglia calibrate --model-path checkpoints --max-drop 0.02 --confidence 0.95

    microglia calibrate --model-path checkpoints --latency-ratio 1.1
    """
    from microglia.experiments.calibrate import KEEP_RATIOS
    from microglia.record import append_records

    ratios = o.numbers("--settings", settings_to_try, float) or KEEP_RATIOS
    folder = output_dir or Path(model_path or "")
    if output_dir is None and model_path is not None and not folder.is_dir():
        raise CheckpointError(f"{model_path} is no folder to save the result in; say --output-dir FOLDER")
    system = loading.system(model_path)
    o.check_output(folder)
    with progress("answering", f"{folder / LEDGER} keeps the finished settings: {GO_ON}") as update:
        promise = system.calibrate(
            examples.dataset,
            max_drop=max_drop,
            confidence=confidence,
            keep_ratio=keep_ratio,
            latency_ratio=latency_ratio,
            keep_ratios=ratios,
            **examples.which(),
            **vars(generation),
            ledger=folder / LEDGER,
            progress=update,
        )
    save(str(model_path), folder, system)
    append_records(folder / RECORDS, records(promise, measured_on(system.model), examples.seed))
    data = replace(promise, settings={**promise.settings, "output_dir": str(folder)}).to_json()
    return Outcome(data, [*([tried(promise)] if promise.tried else []), promise.sentence])


def save(source: str, folder: Path, system: Any) -> None:
    """The checkpoint as it was, but with the chosen threshold and its promise."""
    from microglia.checkpoint import Checkpoint

    Checkpoint.from_pretrained(source).calibrated(system.pruner, system.promise).save_pretrained(folder)


def records(promise: Any, made: Any, seed: int) -> list[Any]:
    """One record per setting that was tried."""
    from microglia.results import plain

    shared = {name: promise.settings[name] for name in ("dataset", "split", "execution")}
    record = recorder(made, seed, {**shared, "confidence": promise.confidence, "max_drop": promise.max_drop})
    return [
        record("accuracy_drop", one.drop, promise.prompts, **plain(one), chosen=one.threshold == promise.threshold)
        for one in promise.tried
    ]


def tried(promise: Any) -> Any:
    """One line per setting, gentlest first."""
    rows = [
        [
            share(one.keep_ratio),
            "" if one.keep_ratio_per_token is None else share(one.keep_ratio_per_token),
            share(one.accuracy),
            str(one.lost),
            str(one.won),
            points(one.drop),
            points(one.drop_bound),
            "chosen" if one.threshold == promise.threshold else "",
        ]
        for one in promise.tried
    ]
    columns = ("heads kept", "per token", "right", "lost", "won", "drop", f"limit, {promise.confidence:.0%}", "")
    title = f"{promise.prompts} prompts, dense {share(promise.dense_accuracy)} right"
    return table(title, columns, rows, padding=(0, 1))
