"""Agents and their static twin, trained side by side: the same loss, steps and examples, with and without input.

First the twin alone; then the agents, which start from the twin's logits and so learn only what the input adds, and
beside them, for as many steps, the twin again. Seed 0 is what `microglia demo` trains, but for the agents' first
weights.
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
from microglia.policy import AgentPolicy, Policy, StaticPolicy
from microglia.sites import find_sites
from microglia.training import TrainingConfig, train

UNSURE = 1.0  # agents start from the twin's logits clipped to ± this: a gate that is sure lets no gradient pass
AGENTS, TWIN, WORK = "agents", "static-twin", "training"

OnLog = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class PairRecipe:
    """first: of the twin alone; second: of the agents. The twin goes on at half the learning rate of the first."""

    first: TrainingConfig
    second: TrainingConfig

    def of_seed(self, seed: int) -> "PairRecipe":
        """Both stages draw other examples and noise for every seed, and for each other."""
        return PairRecipe(replace(self.first, seed=2 * seed), replace(self.second, seed=2 * seed + 1))


def trained_twin(
    bench: Bench,
    config: TrainingConfig,
    folder: Path,
    *,
    bucket: int | None = None,
    data_dir: Path | None = None,
    twin: StaticPolicy | None = None,
    on_log: OnLog | None = None,
) -> StaticPolicy:
    """One free logit per head, trained on the bench's task; `twin` goes on from where it is. `folder` is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    policy = twin or StaticPolicy.all_kept([site.geometry for site in find_sites(bench.model)])
    train(
        bench.model,
        bench.tokenizer,
        bench.task,
        policy,
        config,
        output_dir=folder,
        look=bench.look,
        bucket=bucket,
        data_dir=data_dir,
        quiet=True,
        on_log=on_log,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return policy


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
) -> tuple[Policy, Policy]:
    """Agents and twin of a seed, kept as two checkpoints in `folder` and taken from there when they are there.

    bench: whose task is trained on, and whose examples the checkpoints' dial is set on.
    """
    recipe = recipe.of_seed(seed)
    told = {"dataset": bench.task.name, "first": asdict(recipe.first), "config": asdict(recipe.second)}
    found = [_saved(folder / name, bench, told) for name in (AGENTS, TWIN)]
    if found[0] is not None and found[1] is not None:
        return found[0], found[1]

    def twin_after(config: TrainingConfig, twin: StaticPolicy | None) -> StaticPolicy:
        return trained_twin(bench, config, folder / WORK, bucket=bucket, data_dir=data_dir, twin=twin, on_log=on_log)

    twin = twin_after(recipe.first, None)
    torch.manual_seed(seed)
    agents = AgentPolicy([site.geometry for site in find_sites(bench.model)])
    agents.start_from(list(twin.logits), limit=UNSURE)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    train(
        bench.model,
        bench.tokenizer,
        bench.task,
        agents,
        recipe.second,
        output_dir=folder / WORK,
        look=bench.look,
        bucket=bucket,
        data_dir=data_dir,
        quiet=True,
        on_log=on_log,
    )
    twin = twin_after(replace(recipe.second, learning_rate=recipe.first.learning_rate / 2), twin)
    for name, policy in {AGENTS: agents, TWIN: twin}.items():
        config = MicrogliaConfig.describing(
            bench.model,
            policy,
            base_model=base_model,
            gate=Gate(bucket=bucket),
            look=bench.look,
            fill=bench.fill,
            scope=bench.scope,
            template=bench.task.template,
            training=told,
        )
        Checkpoint(policy, config, bench.logits(policy)).save_pretrained(folder / name)
    return agents.eval(), twin.eval()


def _saved(folder: Path, bench: Bench, told: dict[str, Any]) -> Policy | None:
    """The policy of a checkpoint that was trained as told on this kind of model; None when there is none."""
    if not folder.is_dir():
        return None
    saved = Checkpoint.from_pretrained(folder)
    saved.check(bench.model)
    if saved.config.training != json.loads(json.dumps(told)):
        raise CheckpointError(f"{folder} was trained by another recipe; give another --output-dir")
    return saved.policy.to(next(bench.model.parameters()).device).eval()
