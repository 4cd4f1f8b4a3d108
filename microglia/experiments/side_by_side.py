"""Agents and their static baseline, trained side by side: the same loss, steps and examples, with and without input.

First the static baseline alone; then the agents, which start from its logits and so learn only what the input adds, and
beside them, for as many steps, the baseline again. What the agents have over it is what deciding by the prompt adds.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microglia.checkpoint import Checkpoint
from microglia.errors import CheckpointError
from microglia.evaluation.setup import Setup
from microglia.gate import Gate
from microglia.policies import StaticPolicy, new_agents
from microglia.pruner import Pruner
from microglia.signals import usual_signals
from microglia.tasks.base import Example, Task
from microglia.tasks.used import fingerprint, question_keys
from microglia.training import TrainingConfig, TrainingResult
from microglia.training.loop import examples_of
from microglia.training.static_baseline import baseline_config, new_static_baseline, train_in_memory

UNSURE = 1.0  # agents start from the baseline's logits clipped to ± this: a gate that is sure lets no gradient pass
AGENTS, BASELINE = "agents", "static-baseline"  # folders of a saved pair


@dataclass(frozen=True)
class PairRecipe:
    """first: of the static baseline alone; second: of the agents. The baseline goes on at half of its learning rate.

    policy, hidden_dim: which agents, as in `new_agents`.
    """

    first: TrainingConfig
    second: TrainingConfig
    policy: str = "mixture"
    hidden_dim: int | None = None

    def of_seed(self, seed: int) -> "PairRecipe":
        """Both stages draw other examples and noise for every seed, and for each other."""
        return replace(self, first=replace(self.first, seed=2 * seed), second=replace(self.second, seed=2 * seed + 1))


@dataclass(frozen=True)
class Pair:
    """`history` holds what training the agents logged; empty when they came from a folder."""

    agents: Pruner
    static_baseline: Pruner
    history: list[dict[str, Any]]


def train_pair(
    setup: Setup,
    recipe: PairRecipe,
    seed: int,
    *,
    gate: Gate | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Pair:
    """Train agents and static baseline of a seed. `tell` hears of each stage; `options` go to `train_in_memory`."""
    recipe = recipe.of_seed(seed)

    def stage(name: str, pruner: Pruner, config: TrainingConfig) -> TrainingResult:
        if tell:
            tell(f"training {name}: {config.max_steps} steps of {config.batch_size} problems")
        return train_in_memory(setup.model, setup.tokenizer, setup.task, pruner, config, **options)

    baseline = stage("static baseline", new_static_baseline(setup.model, gate), recipe.first).pruner
    agents = agents_from(baseline, setup, seed, recipe.policy, hidden_dim=recipe.hidden_dim)
    trained = stage("agents", agents, recipe.second)
    further = baseline_config(recipe.second, learning_rate=recipe.first.learning_rate / 2)
    return Pair(trained.pruner, stage("static baseline, on", baseline, further).pruner, trained.history)


def agents_from(like: Pruner, setup: Setup, seed: int, kind: str, *, warm: bool = True, **options: Any) -> Pruner:
    """New agents with another pruner's gate; they start from its static logits if `warm`. options: of `new_agents`."""
    torch.manual_seed(seed)
    signals = {"signals": usual_signals(like.units), **options}
    agents = new_agents(kind, [site.geometry for site in like.sites(setup.model)], **signals)
    if warm and isinstance(like.policy, StaticPolicy):
        agents.start_from(list(like.policy.logits), limit=UNSURE)
    return replace(like, policy=agents, budget=None)


def saved_pair(
    setup: Setup, recipe: PairRecipe, seed: int, folder: Path, *, base_model: str | None = None, **options: Any
) -> Pair:
    """Agents and static baseline of a seed, kept as two checkpoints in `folder` and loaded when they are there.

    setup: whose task is trained on, and whose examples give the checkpoints their budget. `options` go to `train_pair`.
    """
    of_seed = recipe.of_seed(seed)
    training: dict[str, Any] = {"dataset": setup.task.name, "policy": recipe.policy, "hidden_dim": recipe.hidden_dim}
    training |= {"first": asdict(of_seed.first), "config": asdict(of_seed.second)}
    data_dir = options.get("data_dir")
    training["data"] = [fingerprint(part) for part in _examples(setup.task, of_seed, data_dir)]
    before = [load(folder / name, setup, training) for name in (AGENTS, BASELINE)]
    if before[0] is not None and before[1] is not None:
        return Pair(before[0], before[1], [])
    pair = train_pair(setup, recipe, seed, **options)
    for name, pruner in {AGENTS: pair.agents, BASELINE: pair.static_baseline}.items():
        used = questions(setup, of_seed, data_dir)
        save(setup, pruner, folder / name, base_model=base_model, training=training, used=used)
    return pair


def questions(setup: Setup, recipe: PairRecipe, data_dir: Path | None = None) -> frozenset[str]:
    """Keys of the questions that a pair is trained on, and of the setup's, which set its thresholds."""
    parts = [*_examples(setup.task, recipe, data_dir), setup.examples]
    return question_keys(example.question for part in parts for example in part)


def _examples(task: Task, recipe: PairRecipe, data_dir: Path | None) -> list[list[Example]]:
    return [part for config in (recipe.first, recipe.second) for part in examples_of(task, config, data_dir)]


def save(setup: Setup, pruner: Pruner, folder: Path, **description: Any) -> None:
    """Write a checkpoint of a pruner whose budget is that of the setup's examples; description: of `Checkpoint.of`."""
    saved = Checkpoint.of(setup.model, setup.calibrated(pruner), template=setup.task.template, **description)
    saved.save_pretrained(folder)


def load(folder: Path, setup: Setup, training: dict[str, Any]) -> Pruner | None:
    """The pruner of a checkpoint on this kind of model, None when there is none.

    Raises CheckpointError when it was trained by another recipe than `training`.
    """
    if not folder.is_dir():
        return None
    saved = Checkpoint.from_pretrained(folder)
    if saved.config.training != json.loads(json.dumps(training)):
        raise CheckpointError(f"{folder} was trained by another recipe; give another --output-dir")
    saved.load_onto(setup.model)
    return saved.pruner
