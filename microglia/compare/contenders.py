"""Who is compared: agents of checkpoints, criteria of the literature, and always the agents' static twin."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from microglia.checkpoint import Checkpoint
from microglia.errors import ConfigError
from microglia.evaluation.bench import Bench
from microglia.policy import Policy
from microglia.tasks.base import Example
from microglia.training import TrainingConfig

AGENTS, TWIN, PER_INPUT = "agents", "gate", ":per-input"
TWIN_LEARNING_RATE = 0.1  # of a free logit per head, as in the demo; an MLP's would leave it where it began


@dataclass(frozen=True)
class Contender:
    """A name in tables, and the policy that a seed makes.

    identity: what tells its policies from others of that name, for a ledger; of each policy where they are counted.
    count: how many policies there are, of which `make` then gives the first, second, …; None when any seed makes one.
    """

    name: str
    identity: Any
    make: Callable[[int], Policy]
    count: int | None = None

    def identity_of(self, place: int) -> Any:
        """What tells the policy of a seed from others; it does not depend on which other seeds there are."""
        return self.identity if self.count is None else self.identity[place]


def parsed(words: Sequence[str]) -> list[str]:
    """`["norm,taylor", "norm:per-input"]` → names without repetition, agents first and the static twin second."""
    given = [word.strip() for text in words for word in text.split(",") if word.strip()]
    return list(dict.fromkeys([AGENTS, *(w for w in given if w.startswith(f"{TWIN}=")), TWIN, *given]))


def agents(policies: Sequence[Policy], name: str = AGENTS) -> Contender:
    """Trained policies, one for all seeds or one per seed."""
    return Contender(name, [policy.fingerprint() for policy in policies], policies.__getitem__, len(policies))


def saved(name: str, folders: Sequence[str], model: Any) -> Contender:
    """`name=FOLDER`, once or once per seed: other checkpoints' policies. Raises CheckpointError for another model's."""
    policies = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{name}={folder} was given; give name=FOLDER with a checkpoint folder, or a criterion's name"
            )
        checkpoint = Checkpoint.from_pretrained(folder)
        checkpoint.check(model)
        if checkpoint.config.lora:
            raise ConfigError(f"{folder} brings a LoRA adapter, so it is another model; compare it in a run of its own")
        policies.append(checkpoint.policy.to(next(model.parameters()).device).eval())
    return agents(policies, name)


def criterion(
    word: str,
    bench: Bench,
    examples: Callable[[int | None, int], Sequence[Example]],
    *,
    bucket: int | None,
    trained: dict[str, Any] | None = None,
    calibration_prompts: int = 128,
) -> Contender:
    """A criterion by its name, `:per-input` behind it if it shall look at each prompt.

    examples(limit, seed) draws what it is calibrated on. The static twin is trained as the agents were: `trained` holds
    their options. Raises ConfigError for an unknown name.
    """
    criteria = import_module("microglia.criteria")
    name = word.removesuffix(PER_INPUT)
    limit: int | None = calibration_prompts
    options: dict[str, Any] = {}
    if name == TWIN and trained is not None:
        options = {"config": twin_recipe(trained)}
        limit = options["config"].limit
    found = criteria.get_criterion(name, **options)
    identity = {"criterion": word, "prompts": limit, **{key: asdict(value) for key, value in options.items()}}

    def make(seed: int) -> Policy:
        calibration = criteria.Calibration(
            bench.model,
            bench.tokenizer,
            bench.task,
            examples(limit, seed),
            look=bench.look,
            bucket=bucket,
            batch_size=16,
            seed=seed,
        )
        return found.policy(calibration, per_input=word.endswith(PER_INPUT))

    return Contender(word, identity, make)


def twin_recipe(trained: dict[str, Any]) -> TrainingConfig:
    """The agents' own training, for a policy that has one free logit per head and sees no input."""
    known = {f.name for f in fields(TrainingConfig)}
    told: dict[str, Any] = {name: value for name, value in trained.items() if name in known}
    told |= {name: tuple(value) for name, value in told.items() if isinstance(value, list)}  # JSON has no tuples
    config = TrainingConfig(**told)
    return replace(
        config,
        learning_rate=TWIN_LEARNING_RATE,
        lora="none",
        patience=0,
        report_to="none",
        save_steps=10_000_000,
        gradient_checkpointing=False,
    )


def contenders(
    words: Sequence[str],
    bench: Bench,
    own: Sequence[Policy],
    examples: Callable[[int | None, int], Sequence[Example]],
    *,
    bucket: int | None,
    trained: dict[str, Any] | None = None,
    twins: Sequence[Policy] = (),
) -> list[Contender]:
    """The contenders of `parsed` names; `name=FOLDER` again is the policy of the next seed.

    `twins`, trained together with the agents, or `gate=FOLDER` take the place of a twin that would be trained here.
    """
    found: dict[str, Contender] = {}
    wanted = parsed(words)
    for word in wanted:
        name, folder, _ = word.partition("=")
        if name in found:
            continue
        if word == AGENTS:
            found[name] = agents(own)
        elif name == TWIN and twins:
            found[name] = agents(twins, name)
        elif folder:
            found[name] = saved(name, [w.partition("=")[2] for w in wanted if w.startswith(f"{name}=")], bench.model)
        else:
            found[name] = criterion(word, bench, examples, bucket=bucket, trained=trained)
    return list(found.values())
