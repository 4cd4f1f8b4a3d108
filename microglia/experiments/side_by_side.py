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

from microglia.checkpoint import Checkpoint, MicrogliaConfig
from microglia.errors import CheckpointError
from microglia.evaluation.bench import Bench
from microglia.gate import Gate
from microglia.policy import AgentPolicy, Policy, StaticPolicy, new_agents
from microglia.sites import find_sites
from microglia.training import TrainingConfig
from microglia.training.static_baseline import baseline_config, train_in_memory, train_static_baseline

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

    agents: Policy
    static_baseline: Policy
    history: list[dict[str, Any]]


def train_pair(
    setup: Bench, recipe: PairRecipe, seed: int, *, tell: Callable[[str], None] | None = None, **options: Any
) -> Pair:
    """Train agents and static baseline of a seed. `tell` hears of each stage; `options` go to `train_in_memory`."""
    recipe = recipe.of_seed(seed)
    place = (setup.model, setup.tokenizer, setup.task)
    options = {"look": setup.look, **options}

    def announce(name: str, config: TrainingConfig) -> TrainingConfig:
        if tell:
            tell(f"training {name}: {config.max_steps} steps of {config.batch_size} problems")
        return config

    baseline = train_static_baseline(*place, announce("static baseline", recipe.first), **options)
    agents = agents_from(baseline, setup, seed, recipe.policy, hidden_dim=recipe.hidden_dim)
    history = train_in_memory(*place, agents, announce("agents", recipe.second), **options)
    further = baseline_config(recipe.second, learning_rate=recipe.first.learning_rate / 2)
    train_static_baseline(*place, announce("static baseline, on", further), baseline=baseline, **options)
    return Pair(agents.eval(), baseline.eval(), history)


def agents_from(baseline: StaticPolicy | None, setup: Bench, seed: int, kind: str, **options: Any) -> AgentPolicy:
    """New agents that start from a static baseline's logits, where there is one; `options` go to `new_agents`."""
    torch.manual_seed(seed)
    agents = new_agents(kind, [site.geometry for site in find_sites(setup.model)], **options)
    if baseline is not None:
        agents.start_from(list(baseline.logits), limit=UNSURE)
    return agents


def saved_pair(
    setup: Bench,
    recipe: PairRecipe,
    seed: int,
    folder: Path,
    *,
    base_model: str | None = None,
    bucket: int | None = None,
    **options: Any,
) -> Pair:
    """Agents and static baseline of a seed, kept as two checkpoints in `folder` and loaded when they are there.

    setup: whose task is trained on, and whose examples give the checkpoints their budget. `options` go to `train_pair`.
    """
    of_seed = recipe.of_seed(seed)
    training: dict[str, Any] = {"dataset": setup.task.name, "policy": recipe.policy, "hidden_dim": recipe.hidden_dim}
    training |= {"first": asdict(of_seed.first), "config": asdict(of_seed.second)}
    before = [load(folder / name, setup, training) for name in (AGENTS, BASELINE)]
    if before[0] is not None and before[1] is not None:
        return Pair(before[0], before[1], [])
    pair = train_pair(setup, recipe, seed, bucket=bucket, **options)
    for name, policy in {AGENTS: pair.agents, BASELINE: pair.static_baseline}.items():
        save(setup, policy, folder / name, Gate(bucket=bucket), base_model=base_model, training=training)
    return pair


def save(
    setup: Bench, policy: Policy, folder: Path, gate: Gate, *, base_model: str | None, training: dict[str, Any]
) -> None:
    """Write a checkpoint of `policy` whose budget is that of the setup's examples."""
    config = MicrogliaConfig.describing(
        setup.model,
        policy,
        base_model=base_model,
        gate=gate,
        look=setup.look,
        fill=setup.fill,
        scope=setup.scope,
        template=setup.task.template,
        training=training,
    )
    Checkpoint(policy, config, setup.logits(policy)).save_pretrained(folder)


def load(folder: Path, setup: Bench, training: dict[str, Any]) -> Policy | None:
    """The policy of a checkpoint on this kind of model, None when there is none.

    Raises CheckpointError when it was trained by another recipe than `training`.
    """
    if not folder.is_dir():
        return None
    saved = Checkpoint.from_pretrained(folder)
    saved.check(setup.model)
    if saved.config.training != json.loads(json.dumps(training)):
        raise CheckpointError(f"{folder} was trained by another recipe; give another --output-dir")
    return saved.policy.to(next(setup.model.parameters()).device).eval()
