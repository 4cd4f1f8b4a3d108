"""What is compared: trained policies and criteria by name, always with the agents and their static baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from microglia.checkpoint import Checkpoint
from microglia.criteria import Calibration, get_criterion
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.experiments.compare.controls import CONTROLS, EQUAL_TIME, FROZEN, SHUFFLED, frozen, shuffled
from microglia.policies import Policy
from microglia.pruner import Fill, Pruner
from microglia.tasks.base import Example
from microglia.tasks.used import fingerprint
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config

AGENTS, BASELINE, PER_INPUT = "agents", "static_baseline", ":per-input"

Examples = Callable[[int | None, int], Sequence[Example]]  # of a number and a seed


@dataclass(frozen=True)
class Entry:
    """A name in tables, and the pruner that a seed makes, of which policy and recovery count.

    identity: what tells the pruner that a seed makes from others of that name, for a ledger.
    count: how many there are, of which both then give the first, second, …; None when any seed makes one.
    fill: what its pruned heads leave behind, None for what the agents' leave.
    of_agents: makes the policy of a control from the agents' pruner at a keep ratio and held-out prompts; `make` then
    gives the agents' policy. effort: what making it took, for the record.
    """

    name: str
    identity: Callable[[int], Any]
    make: Callable[[int], Pruner]
    count: int | None = None
    fill: Fill | None = None
    of_agents: Callable[[Pruner, Setup], Policy] | None = None
    effort: dict[str, Any] = field(default_factory=dict)


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
    calibration_examples: int | None = None,
) -> list[Entry]:
    """An entry for each of `parsed` names: the pruners that are there, or those of its folders, or its criterion.

    examples: what criteria are calibrated on. like: the agents' pruner, whose window and bucket all share, and its fill
    but for criteria whose paper has the mean. training: the agents' training as a checkpoint holds it, by which the
    static baseline is trained too. calibration_examples: of criteria that are not trained, None for each one's own.
    """
    options = {BASELINE: {"config": baseline_of(training)}} if training and training.get("config") else {}
    entries = list[Entry]()
    for name, folders in parsed(words).items():
        if name in CONTROLS:
            of = BASELINE if name == EQUAL_TIME else AGENTS
            entries.append(control(name, next(entry for entry in entries if entry.name == of)))
        elif ready := pruners.get(name) or [pruner_in(folder, name, setup.model) for folder in folders]:
            prints = [_fingerprint(pruner) for pruner in ready]
            saved = training if pruners.get(name) else Checkpoint.from_pretrained(folders[0]).config.training
            effort = effort_of(saved)
            entries.append(Entry(name, prints.__getitem__, ready.__getitem__, len(ready), effort=effort))
        else:
            chosen: dict[str, Any] = {"calibration_examples": calibration_examples, **options.get(name, {})}
            entries.append(criterion(name, setup, examples, like=like, **chosen))
    return entries


def control(name: str, of: Entry) -> Entry:
    """A control made of another entry: the agents, or for equal time their static baseline."""
    made = {FROZEN: frozen, SHUFFLED: shuffled}.get(name)
    return replace(of, name=name, identity=lambda seed: {"control": name, "of": of.identity(seed)}, of_agents=made)


def effort_of(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """Steps, examples and time behind trained policies, as far as their checkpoint says it; pairs have two stages."""
    stages = [config_of(training[name]) for name in ("first", "config") if training and training.get(name)]
    if not stages:
        return {}
    drawn = {f"stage {i}": {"steps": c.max_steps, "batch_size": c.batch_size} for i, c in enumerate(stages, 1)}
    if min(c.max_steps for c in stages) < 1:
        return {"trained": True, **drawn}
    return {"trained": True, "examples": sum(c.max_steps * c.batch_size for c in stages), **drawn}


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


def criterion(
    word: str,
    setup: Setup,
    examples: Examples,
    *,
    like: Pruner,
    calibration_examples: int | None = None,
    **options: Any,
) -> Entry:
    """A criterion by its name, `:per-input` behind it if it shall decide for each prompt.

    Raises ConfigError for an unknown name.
    """
    chosen = get_criterion(word.removesuffix(PER_INPUT), **options)
    trained = "config" in options
    limit = options["config"].limit if trained else calibration_examples or chosen.examples
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

    effort = effort_of({"config": asdict(options["config"])}) if trained else {"trained": False, "examples": limit}
    return Entry(word, identity, make, fill=fill, effort=effort)


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
