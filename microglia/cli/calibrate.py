"""`microglia calibrate`: prune as far as a promise about the accuracy of a checkpoint allows."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
    loss: Annotated[
        Literal["accuracy", "agreement", "kl"],
        "What may be lost: accuracy, agreement (share of tokens) with the dense model, or kl (nats per token).",
    ] = "accuracy",
    max_drop: Annotated[float, "Largest loss; 0.02 is two points, two tokens of 100, or 0.02 nats."] = 0.02,
    confidence: Annotated[float, "Confidence of the promise."] = 0.95,
    keep_ratio: Annotated[float | None, "Set this one instead, and say what it may lose.", "by the promise"] = None,
    bytes: Annotated[float | None, "Or this share of the bytes of a dense decode step.", "by the promise"] = None,
    latency_ratio: Annotated[float | None, "Or reach this: dense time ÷ time of a step.", "by the promise"] = None,
    settings_to_try: Annotated[o.Many, typer.Option("--settings", help=TO_TRY, show_default="0.95,0.9,…,0.3")] = None,
    output_dir: Annotated[Path | None, "Folder for the result.", "the checkpoint itself"] = None,
    examples: Examples = o.Examples(split="validation"),
    generation: o.Generation,
    loading: o.Unquantised,
) -> Outcome:
    """Prune as much as a promise about the accuracy, or about the tokens, allows.

    microglia calibrate --model-path checkpoints --max-drop 0.02 --confidence 0.95

    microglia calibrate --model-path checkpoints --latency-ratio 1.1

    microglia calibrate --model-path checkpoints --dataset text --loss agreement --max-drop 0.05
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
            loss=loss,
            max_drop=max_drop,
            confidence=confidence,
            keep_ratio=keep_ratio,
            byte_share=bytes,
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
    shared |= {"confidence": promise.confidence, "max_drop": promise.max_drop}
    record = recorder(made, seed, shared, "nats/token" if promise.loss == "kl" else "ratio")
    return [
        record(
            f"{promise.loss}_drop", one.drop, promise.prompts, **plain(one), chosen=one.threshold == promise.threshold
        )
        for one in promise.tried
    ]


def tried(promise: Any) -> Any:
    """One line per setting, gentlest first."""
    limit = f"limit, {promise.confidence:.0%}"
    columns: tuple[str, ...]
    if promise.loss == "accuracy":
        columns = ("heads kept", "per token", "right", "lost", "won", "drop", limit, "")
        cells = [
            [
                "" if one.keep_ratio_per_token is None else share(one.keep_ratio_per_token),
                share(one.accuracy),
                str(one.lost),
                str(one.won),
                points(one.drop),
                points(one.drop_bound),
            ]
            for one in promise.tried
        ]
        title = f"{promise.prompts} prompts, dense {share(promise.dense_accuracy)} right"
    else:
        columns = ("heads kept", WORDS[promise.loss], limit, "")
        cells = [[AMOUNTS[promise.loss].format(x) for x in (one.drop, one.drop_bound)] for one in promise.tried]
        title = f"{promise.prompts} prompts, texts of the dense model or of the data"
    rows = [
        [share(one.keep_ratio), *row, "chosen" if one.threshold == promise.threshold else ""]
        for one, row in zip(promise.tried, cells, strict=True)
    ]
    return table(title, columns, rows, padding=(0, 1))


WORDS = {"agreement": "other tokens", "kl": "KL, nats per token"}
AMOUNTS = {"agreement": "{:.2%}", "kl": "{:.4f}"}
