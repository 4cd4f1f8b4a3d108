"""Agents and their static twin, trained side by side: the same loss, steps and examples, with and without input.

First the twin alone; then the agents, which start from the twin's logits and so learn only what the input adds, and
beside them, for as many steps, the twin again. What the agents have over the twin is what looking at the prompt adds.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microglia.checkpoint import Checkpoint, MicrogliaConfig
from microglia.errors import CheckpointError
from microglia.evaluation.bench import Bench
from microglia.gate import Gate
from microglia.policy import Policy, StaticPolicy, new_agents
from microglia.sites import find_sites
from microglia.training import TrainingConfig, train

UNSURE = 1.0  # agents start from the twin's logits clipped to ± this: a gate that is sure lets no gradient pass
AGENTS, TWIN, WORK = "agents", "static-twin", "training"

OnLog = Callable[[dict[str, Any]], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class PairRecipe:
    """first: of the twin alone; second: of the agents. The twin goes on at half the learning rate of the first.

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
    """Agents and their twin. `history` holds what training the agents logged; empty when they came from a folder."""

    agents: Policy
    twin: Policy
    history: list[dict[str, Any]]


def train_policy(
    bench: Bench,
    policy: Policy,
    config: TrainingConfig,
    folder: Path,
    *,
    bucket: int | None = None,
    data_dir: Path | None = None,
    on_log: OnLog | None = None,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """Train `policy` in place on the bench's task and return the history. `folder` is for the work; it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    result = train(
        bench.model,
        bench.tokenizer,
        bench.task,
        policy,
        config,
        output_dir=folder,
        look=bench.look,
        bucket=bucket,
        data_dir=data_dir,
        quiet=quiet,
        on_log=on_log,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return result.history


def train_pair(
    bench: Bench, recipe: PairRecipe, seed: int, folder: Path, *, tell: Tell | None = None, **how: Any
) -> Pair:
    """Train agents and twin of a seed. `tell` hears of each stage; `how` goes to `train_policy`."""
    recipe, geometries = recipe.of_seed(seed), [site.geometry for site in find_sites(bench.model)]

    def trained(name: str, policy: Policy, config: TrainingConfig) -> list[dict[str, Any]]:
        if tell:
            tell(f"training {name}: {config.max_steps} steps of {config.batch_size} problems")
        return train_policy(bench, policy, config, folder, **how)

    twin = StaticPolicy.all_kept(geometries)
    trained("static twin", twin, recipe.first)
    torch.manual_seed(seed)
    agents = new_agents(recipe.policy, geometries, hidden_dim=recipe.hidden_dim)
    agents.start_from(list(twin.logits), limit=UNSURE)
    history = trained("agents", agents, recipe.second)
    trained("static twin, on", twin, replace(recipe.second, learning_rate=recipe.first.learning_rate / 2))
    return Pair(agents.eval(), twin.eval(), history)


def trained_pair(
    bench: Bench,
    recipe: PairRecipe,
    seed: int,
    folder: Path,
    *,
    base_model: str | None = None,
    bucket: int | None = None,
    data_dir: Path | None = None,
    on_log: OnLog | None = None,
) -> Pair:
    """Agents and twin of a seed, kept as two checkpoints in `folder` and taken from there when they are there.

    bench: whose task is trained on, and whose examples the checkpoints' dial is set on.
    """
    own = recipe.of_seed(seed)
    told: dict[str, Any] = {"dataset": bench.task.name, "policy": recipe.policy, "hidden_dim": recipe.hidden_dim}
    told |= {"first": asdict(own.first), "config": asdict(own.second)}
    found = [_saved(folder / name, bench, told) for name in (AGENTS, TWIN)]
    if found[0] is not None and found[1] is not None:
        return Pair(found[0], found[1], [])
    pair = train_pair(bench, recipe, seed, folder / WORK, bucket=bucket, data_dir=data_dir, on_log=on_log)
    for name, policy in {AGENTS: pair.agents, TWIN: pair.twin}.items():
        save(bench, policy, folder / name, Gate(bucket=bucket), base_model=base_model, training=told)
    return pair


def save(
    bench: Bench, policy: Policy, folder: Path, gate: Gate, *, base_model: str | None, training: dict[str, Any]
) -> None:
    """Write a checkpoint of `policy` whose dial is set on the bench's examples."""
    config = MicrogliaConfig.describing(
        bench.model,
        policy,
        base_model=base_model,
        gate=gate,
        look=bench.look,
        fill=bench.fill,
        scope=bench.scope,
        template=bench.task.template,
        training=training,
    )
    Checkpoint(policy, config, bench.logits(policy)).save_pretrained(folder)


def _saved(folder: Path, bench: Bench, told: dict[str, Any]) -> Policy | None:
    """The policy of a checkpoint that was trained as told on this kind of model; None when there is none."""
    if not folder.is_dir():
        return None
    saved = Checkpoint.from_pretrained(folder)
    saved.check(bench.model)
    if saved.config.training != json.loads(json.dumps(told)):
        raise CheckpointError(f"{folder} was trained by another recipe; give another --output-dir")
    return saved.policy.to(next(bench.model.parameters()).device).eval()
