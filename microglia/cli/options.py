"""Options that several verbs have, with the names of the original scripts (`--base_model`) beside the short ones."""

from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "--base-model", help="Hub id, local folder, or reasoner, the model that ships with microglia."
    ),
]
CheckpointPath = Annotated[
    str | None,
    typer.Option("--model-path", "--checkpoint", help="Checkpoint: a folder that `train` wrote, or a hub id."),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="Task: arithmetic (generated, needs no network), gsm8k, svamp, math, math-500, bbh, bbh-logic, arc-easy, "
        "arc-challenge, or jsonl, your own file.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Local folder with the task's files, or a JSONL file.", show_default="the hub"),
]
AnswerRoom = Annotated[
    float | None,
    typer.Option(
        "--answer-room",
        help="Cut answers longer than so many times their worked answer; saves time where masks ramble.",
        show_default="never",
    ),
]
Shots = Annotated[int, typer.Option("--shots", min=0, help="Solved examples at the start of every prompt.")]
QuestionField = Annotated[
    str | None, typer.Option("--question-field", help="Of --dataset jsonl.", show_default="question")
]
AnswerField = Annotated[str | None, typer.Option("--answer-field", help="Of --dataset jsonl.", show_default="answer")]
GenerationPath = Annotated[
    str,
    typer.Option(
        "--path",
        help="compact (heads are gone), graph (the same, captured, for GPUs), masked (no time saved) or dense.",
    ),
]
PrunedPath = Annotated[
    str,
    typer.Option(
        "--path", help="compact (heads are gone), graph (the same, captured, for GPUs) or masked (no time saved)."
    ),
]
KeepRatio = Annotated[
    float | None, typer.Option("--keep-ratio", help="Share of heads to keep on average; prompts still differ.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …", show_default="cuda if there is one")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help=", ".join(DTYPES) + ".", show_default="float32 on a CPU, else as stored")
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="int8 or int4: weight-only, by torchao.", show_default="as stored"),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")]


def loading(
    device: str | None, dtype: str | None, trust_remote_code: bool, quantize: str | None = None
) -> dict[str, Any]:
    """Keyword arguments of the system for these; ConfigError for a device or type that does not exist."""
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    try:
        usable = device is None or torch.empty(0, device=device).numel() == 0
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable or device == "meta":
        raise ConfigError(
            f"device={device!r} cannot be used here; leave it out, or choose cpu or a device that torch sees"
        )
    return {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "quantize": quantize}


def load(model_path: str | None, model: str | None, **how: Any) -> Any:
    """The system of a checkpoint, on another base model if one is given."""
    from microglia.system import MicrogliaPruningSystem

    if model_path is None:
        raise ConfigError("no checkpoint was given; say --model-path FOLDER, which `microglia train` writes")
    return MicrogliaPruningSystem.from_pretrained(model_path, model, **how)


def task(dataset: str, shots: int, question_field: str | None, answer_field: str | None) -> Any:
    """The task of these options."""
    from microglia.tasks import get_task

    given = {"shots": shots, "question_field": question_field, "answer_field": answer_field}
    return get_task(dataset, **{name: value for name, value in given.items() if value is not None})
