"""Options that several verbs have, as bundles: what belongs together is handed over as one value."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from microglia.cli.bundles import Fields
from microglia.cli.settings import RENAMED
from microglia.errors import ConfigError
from microglia.tasks import TASKS, get_task

Many = list[str] | None  # numbers or names, separated by commas, repeated, or both

CheckpointPath = Annotated[
    str | None, typer.Option("--model-path", help="Checkpoint: a folder that `train` wrote, or a hub id.")
]
ShippedOrPath = Annotated[
    str | None,
    typer.Option(
        "--model-path",
        help="Checkpoint: a folder that `train` wrote, or a hub id.",
        show_default="agents that ship for --model",
    ),
]
AnswerLimit = Annotated[
    float | None,
    "Stop an answer at so many times the length of its worked answer, which saves time on hurt models.",
    "no limit",
]
KeepRatio = Annotated[
    float | None, "Share of units to keep on average; prompts still differ.", "as the checkpoint decides"
]
Bytes = Annotated[
    float | None,
    "Share of the bytes of a dense decode step to read on average, output head included; instead of --keep-ratio.",
    "as the checkpoint decides",
]
Execution = Annotated[
    str,
    typer.Option(
        metavar="<name>",
        callback=lambda name: RENAMED.get(name, name),
        help="dense: not pruned. masked: pruned, but no time is saved. compact: pruned heads are sliced out. captured: "
        "compact, in captured steps (CUDA graphs). fast: compact, in steps of our own on a CPU. Or one of your own.",
    ),
]
Raw = Annotated[bool, "The prompt is complete: put no template around it."]
Seed = Annotated[int, "Seed of everything that is drawn."]


def names(given: Sequence[str]) -> list[str]:
    """`["a,b", "c"]` → a, b and c."""
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def check_output(folder: Path | None) -> None:
    """Raise CheckpointError when results could not be written there: better known before than after."""
    from microglia.checkpoint import check_writable

    if folder is not None:
        check_writable(folder)


def numbers(option: str, given: Sequence[str] | None, kind: type) -> list:
    """`["1,8", "16"]` → `[1, 8, 16]`. Raises ConfigError for what is no number."""
    try:
        return [kind(word) for word in names(given or ())]
    except ValueError:
        raise ConfigError(f"{option} {','.join(given or ())} was given; give numbers separated by commas") from None


@dataclass(frozen=True)
class Loading:
    """The base model, and how it is loaded."""

    panel: ClassVar = "Model"
    model: Annotated[str | None, "Hub id, folder, GGUF file or known name.", "the checkpoint's"] = None
    device: Annotated[str | None, "Device: cpu, cuda, cuda:1, …", "cuda if there is one"] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, "Type of the weights.", "float32 on a CPU, else as stored"
    ] = None
    quantize: Annotated[Literal["int8", "int4"] | None, "Quantise the weights, by torchao.", "as stored"] = None
    trust_remote_code: Annotated[bool, "Run code that comes with a hub model."] = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the system, without the model. Raises ConfigError for a device that does not exist."""
        import torch

        try:
            usable = self.device is None or torch.empty(0, device=self.device).numel() == 0
        except (RuntimeError, AssertionError, NotImplementedError):
            usable = False
        if not usable or self.device == "meta":
            raise ConfigError(
                f"device={self.device!r} cannot be used here; leave it out, or choose cpu or a device that torch sees"
            )
        return {name: value for name, value in asdict(self).items() if name != "model"}

    def checkpoint(self, given: str | None) -> str:
        """The checkpoint that was given, else that of the agents which come with the package for this model."""
        from microglia.checkpoint.shipped import shipped
        from microglia.models import REASONER

        return given if given is not None else str(shipped(self.model or REASONER))

    def system(self, checkpoint: str | None, **changes: Any) -> Any:
        """The system of a checkpoint, on another base model if one is given."""
        from microglia.system import MicrogliaPruningSystem

        if checkpoint is None:
            raise ConfigError("no checkpoint was given; say --model-path FOLDER, which `microglia train` writes")
        return MicrogliaPruningSystem.from_pretrained(checkpoint, self.model, **{**self.arguments(), **changes})


Unquantised = Annotated[Loading, Fields(without=("quantize",))]


@dataclass(frozen=True)
class TaskOptions:
    """A task and where its files are."""

    panel: ClassVar = "Task"
    dataset: Annotated[str, f"Task: {', '.join(TASKS)} (your own file)."] = "arithmetic"
    data_dir: Annotated[Path | None, "Its folder or file; of prompts several.", "the hub"] = None
    shots: Annotated[int, typer.Option(min=0, help="Solved examples at the start of every prompt.")] = 0
    question_field: Annotated[str | None, "Field of a jsonl file with the question.", "question"] = None
    answer_field: Annotated[str | None, "Field of a jsonl file with the answer.", "answer"] = None

    def task(self) -> Any:
        """The task of these options."""
        given = {"shots": self.shots or None, "question_field": self.question_field, "answer_field": self.answer_field}
        return get_task(self.dataset, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Examples(TaskOptions):
    """Examples of a task."""

    split: Annotated[str, "Part of the data: train, validation or test."] = "test"
    limit: Annotated[int | None, "Number of examples.", "all"] = None
    seed: Annotated[int, "Seed of everything that is drawn."] = 0

    def which(self) -> dict[str, Any]:
        """Keyword arguments that say which examples."""
        return {name: getattr(self, name) for name in ("split", "limit", "seed", "data_dir")}

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Dataset and split, and what else a result remembers of these options."""
        others = {name: getattr(self, name) for name in ("limit", "seed", "shots", "question_field", "answer_field")}
        return {"dataset": self.dataset, "split": self.split}, others

    def load(self, **changes: Any) -> Sequence[Any]:
        """These examples, or others of the task."""
        return self.task().load(**{**self.which(), **changes})


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    panel: ClassVar = "Generation"
    execution: Execution = "compact"
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 32

    def setup(self, model: Any, tokenizer: Any, task: Any, examples: Any, answer_limit: float | None = None) -> Any:
        """How every pruner is put to these examples."""
        from microglia.evaluation.setup import Setup

        return Setup(model, tokenizer, task, examples, answer_limit=answer_limit, **asdict(self))


@dataclass(frozen=True)
class PrunerOptions:
    """What decides about which units, by which signals, and how they are pruned."""

    panel: ClassVar = "Pruner"
    policy: Annotated[
        str,
        "agents, layers, mixture or codebook.",
    ] = "agents"
    hidden_dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Hidden size of an MLP, or the number of masks of a mixture.", show_default="128; 16 masks"
        ),
    ] = None
    units: Annotated[str, "What may go: head, channel, sublayer."] = "head"
    signals: Annotated[
        str | None,
        "Statistics of the prompt that the policy reads, by commas: norm, entropy and conflict of heads, activation "
        "and contribution of channels, cosine of sublayers.",
        "all of the units but conflict",
    ] = None
    window: Annotated[
        int, typer.Option(min=0, help="Last prompt tokens over which the entropy is taken; 0 takes all.")
    ] = 64
    bucket: Annotated[int | None, "Counts of kept heads are rounded up to multiples of it.", "heads / 8"] = None
    least_kept: Annotated[
        float, typer.Option(min=0, max=1, help="Share of every layer's units that is kept in any case.")
    ] = 0.0
    fill: Annotated[
        Literal["zero", "mean"], "What stands for the output of a pruned unit: zero, or its mean over the prompt."
    ] = "zero"
    block: Annotated[int, typer.Option(min=1, help="Channels that go or stay together, at most.")] = 64
    shared: Annotated[
        float, typer.Option(min=0, max=1, help="Share of each layer's blocks of channels that every prompt keeps.")
    ] = 0.0
    protected: Annotated[str, "Layers whose sublayers always stay, by commas; -1 is the last."] = "0,1,-1"

    def parts(self) -> dict[str, Any]:
        """Keyword arguments of the system."""
        from microglia.units import Arrangement

        row = {**asdict(self), "window": self.window or None, "units": tuple(names([self.units]))}
        block, shared, layers = (row.pop(name) for name in ("block", "shared", "protected"))
        protected = tuple(numbers("--protected", [layers], int))
        return {**row, "arrangement": Arrangement(block=block, shared=shared, protected=protected)}
