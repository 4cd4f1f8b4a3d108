"""What is compared: trained policies and criteria by name, always with the agents and their static baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from microglia.checkpoint import Checkpoint
from microglia.criteria import Calibration, get_criterion
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.pruner import Fill, Pruner
from microglia.tasks.base import Example
from microglia.tasks.used import fingerprint
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config

AGENTS, BASELINE, PER_INPUT = "agents", "static_baseline", ":per-input"
CALIBRATION_PROMPTS = 128  # of a criterion that is not trained as the agents were

Examples = Callable[[int | None, int], Sequence[Example]]  # of a number and a seed


@dataclass(frozen=True)
class Entry:
    """A name in tables, and the pruner that a seed makes, of which policy and recovery count.

    identity: what tells the pruner that a seed makes from others of that name, for a ledger.
    count: how many there are, of which both then give the first, second, …; None when any seed makes one.
    fill: what its pruned heads leave behind, None for what the agents' leave.
    """

    name: str
    identity: Callable[[int], Any]
    make: Callable[[int], Pruner]
    count: int | None = None
    fill: Fill | None = None


def parsed(words: Sequence[str]) -> dict[str, list[str]]:
    """`["norm,taylor=RUN"]` → names and their folders, once per seed; agents first, the static baseline second."""
    names: dict[str, list[str]] = {AGENTS: [], BASELINE: []}
    for word in (word.strip() for text in words for word in text.split(",")):
        name, folder_given, folder = word.partition("=")
        if name:
            names.setdefault(name, []).extend([folder] if folder_given else [])
    return names


def make_entries(
    words: Sequence[str],
    setup: Setup,
    examples: Examples,
    pruners: Mapping[str, Sequence[Pruner]],
    *,
    like: Pruner,
    training: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """An entry for each of `parsed` names: the pruners that are there, or those of its folders, or its criterion.

    examples: what criteria are calibrated on. like: the agents' pruner, whose window and bucket all share, and its fill
    but for criteria whose paper has the mean. training: the agents' training as a checkpoint holds it, by which the
    static baseline is trained too.
    """
    options = {BASELINE: {"config": baseline_of(training)}} if training and training.get("config") else {}
    entries = []
    for name, folders in parsed(words).items():
        if ready := pruners.get(name) or [pruner_in(folder, name, setup.model) for folder in folders]:
            prints = [_fingerprint(pruner) for pruner in ready]
            entries.append(Entry(name, prints.__getitem__, ready.__getitem__, len(ready)))
        else:
            entries.append(criterion(name, setup, examples, like=like, **options.get(name, {})))
    return entries


def _fingerprint(pruner: Pruner) -> str:
    """Of the two parts that an entry has of its own."""
    recovery = [] if pruner.recovery is None else [pruner.recovery.fingerprint()]
    return " ".join([pruner.policy.fingerprint(), *recovery])


def pruner_in(folder: str, name: str, model: Any) -> Pruner:
    """The pruner of a checkpoint. Raises CheckpointError for another model's, ConfigError for one with LoRA."""
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{name}={folder} was given; give name=FOLDER with a checkpoint folder, or a criterion's name"
        )
    checkpoint = Checkpoint.from_pretrained(folder)
    if checkpoint.config.lora:
        raise ConfigError(f"{folder} brings a LoRA adapter, so it is another model; compare it in a run of its own")
    checkpoint.load_onto(model)
    return checkpoint.pruner


def criterion(word: str, setup: Setup, examples: Examples, *, like: Pruner, **options: Any) -> Entry:
    """A criterion by its name, `:per-input` behind it if it shall decide for each prompt.

    Raises ConfigError for an unknown name.
    """
    chosen = get_criterion(word.removesuffix(PER_INPUT), **options)
    limit = options["config"].limit if "config" in options else CALIBRATION_PROMPTS
    fill: Fill = "mean" if chosen.fill == "mean" else like.fill
    described = {"criterion": word, "fill": fill, **{name: asdict(value) for name, value in options.items()}}

    def identity(seed: int) -> Any:
        return {**described, "prompts": fingerprint(examples(limit, seed))}

    def make(seed: int) -> Pruner:
        calibration = Calibration(
            setup.model,
            setup.tokenizer,
            setup.task,
            examples(limit, seed),
            window=like.window,
            bucket=like.gate.bucket,
            least_kept=like.gate.least_kept,
            fill=fill,
            batch_size=16,
            seed=seed,
        )
        return chosen.pruner(calibration, per_input=word.endswith(PER_INPUT))

    return Entry(word, identity, make, fill=fill)


def baseline_of(training: Mapping[str, Any]) -> TrainingConfig:
    """How the static baseline of trained agents is trained: where they began with one, with all the steps of both."""
    config = config_of(training["config"])
    if "first" not in training:
        return baseline_config(config)
    first = config_of(training["first"])
    limits = (first.limit, config.limit)
    limit = None if None in limits else sum(filter(None, limits))
    return baseline_config(first, max_steps=first.max_steps + config.max_steps, limit=limit)


def config_of(training: Mapping[str, Any]) -> TrainingConfig:
    """The options of a training as a checkpoint holds them."""
    known = {f.name for f in fields(TrainingConfig)}
    options: dict[str, Any] = {"target": "gold"}  # of before there was another
    options |= {name: x for name, x in training.items() if name in known}
    options |= {name: tuple(x) for name, x in options.items() if isinstance(x, list)}  # JSON has no tuples
    return TrainingConfig(**options)
