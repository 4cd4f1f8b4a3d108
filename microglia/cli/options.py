"""Options that several verbs have, as bundles: what belongs together is handed over as one value."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from microglia.cli.bundles import Fields
from microglia.errors import ConfigError
from microglia.tasks import TASKS, get_task

Many = list[str] | None  # numbers or names, separated by commas, repeated, or both

CheckpointPath = Annotated[
    str | None, typer.Option("--model-path", help="Checkpoint: a folder that `train` wrote, or a hub id.")
]
AnswerLimit = Annotated[
    float | None,
    typer.Option(
        help="Stop an answer at so many times the length of its worked answer, which saves time on hurt models.",
        show_default="no limit",
    ),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of heads to keep on average; prompts still differ.", show_default="as the checkpoint decides"
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="The prompt is complete: put no template around it.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@dataclass(frozen=True)
class Loading:
    """The base model, and how it is loaded."""

    panel: ClassVar = "Model"
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local folder, or reasoner, the model that ships with microglia.",
            show_default="the checkpoint's",
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda, cuda:1, …", show_default="cuda if there is one")
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights.", show_default="float32 on a CPU, else as stored"),
    ] = None
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Quantise the weights, by torchao.", show_default="as stored"),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False

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
    dataset: Annotated[
        str, f"Task: {', '.join(TASKS)}. arithmetic is generated and needs no network; jsonl is a file of your own."
    ] = "arithmetic"
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Local folder with the task's files, or a JSONL file.", show_default="the hub"),
    ] = None
    shots: Annotated[int, typer.Option(min=0, help="Solved examples at the start of every prompt.")] = 0
    question_field: Annotated[
        str | None, typer.Option(help="Field of a jsonl file with the question.", show_default="question")
    ] = None
    answer_field: Annotated[
        str | None, typer.Option(help="Field of a jsonl file with the answer.", show_default="answer")
    ] = None

    def task(self) -> Any:
        """The task of these options."""
        given = {"shots": self.shots or None, "question_field": self.question_field, "answer_field": self.answer_field}
        return get_task(self.dataset, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Examples(TaskOptions):
    """Examples of a task."""

    split: Annotated[str, "Part of the data: train, validation or test."] = "test"
    limit: Annotated[int | None, typer.Option(help="Number of examples.", show_default="all")] = None
    seed: Annotated[int, "Seed of everything that is drawn."] = 0

    def load(self, split: str | None = None, **changes: Any) -> Sequence[Any]:
        """These examples, or those of another split."""
        how = {"limit": self.limit, "seed": self.seed, "data_dir": self.data_dir, **changes}
        return self.task().load(split or self.split, **how)


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    panel: ClassVar = "Generation"
    execution: Annotated[
        Literal["dense", "masked", "compact", "captured"],
        "dense: not pruned. masked: pruned, but no time is saved. compact: pruned heads are sliced out. captured: "
        "compact, in captured steps (CUDA graphs).",
    ] = "compact"
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 32

    @property
    def path(self) -> str:
        """The execution by its name in the library."""
        return "graph" if self.execution == "captured" else self.execution


@dataclass(frozen=True)
class PrunerOptions:
    """What decides, by which signals, and how heads are pruned."""

    panel: ClassVar = "Pruner"
    policy: Annotated[
        Literal["agents", "mixture"],
        "agents: an MLP per layer. mixture: learned masks, mixed per prompt.",
    ] = "agents"
    hidden_dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Hidden size of an MLP, or the number of masks of a mixture.", show_default="128; 16 masks"
        ),
    ] = None
    signals: Annotated[str, "Statistics of the prompt that the policy reads: norm, entropy or both, by commas."] = (
        "norm,entropy"
    )
    window: Annotated[
        int, typer.Option(min=0, help="Last prompt tokens over which the entropy is taken; 0 takes all.")
    ] = 64
    bucket: Annotated[
        int | None,
        typer.Option(help="Counts of kept heads are rounded up to multiples of it.", show_default="heads / 8"),
    ] = None
    fill: Annotated[
        Literal["zero", "mean"], "What stands for the output of a pruned head: zero, or its mean over the prompt."
    ] = "zero"

    @property
    def features(self) -> str:
        """The signals by their name in the library."""
        names = self.signals.replace(" ", "").split(",")
        return "both" if sorted(names) == ["entropy", "norm"] else ",".join(names)
