"""What each part of the recipe is worth: train with one thing changed at a time, or all combinations, and compare.

Every cell is judged twice on the same prompts: at the keep ratio that its own training led to, and at one keep ratio
for all, since accuracies at different keep ratios say little. Differences to the base recipe are paired over prompts
and seeds.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from microglia.errors import ConfigError
from microglia.evaluation.bench import Bench, as_json, from_json
from microglia.evaluation.crossed import crossed_difference, crossed_mean, holm
from microglia.evaluation.run import Evaluation
from microglia.evaluation.significance import wilson_ci
from microglia.gate import Gate, threshold_for
from microglia.ledger import Ledger
from microglia.pair import UNSURE, train_policy
from microglia.policy import TRAINED_ON_INPUT, StaticPolicy, new_agents
from microglia.sites import find_sites
from microglia.training import TrainingConfig, train
from microglia.training.held_out import answer_losses
from microglia.training.loop import TOLD

TWIN_LEARNING_RATE = 0.1  # of a free logit per head, as in the demo

Progress = Callable[[str, int, int], None]
Load = Callable[[], tuple[Any, PreTrainedTokenizerBase]]

# What is varied unless something else is asked for. alpha is the curriculum's end; bucket None is heads / 8.
FACTORS: dict[str, tuple[Any, ...]] = {
    "alpha": (0.1, 0.3, 1.0),
    "beta": (0.0, 0.01, 0.1),
    "temperature": (0.5, 1.0, 2.0),
    "policy": ("mixture", "agents"),
    "hidden_dim": (4, 16, 64),
    "features": ("both", "norm", "entropy"),
    "fill": ("zero", "mean"),
    "bucket": (None, 1, 4),
    "lora": ("none", "first", "joint"),
}


@dataclass(frozen=True)
class Recipe:
    """A training and the agents that are trained.

    policy, hidden_dim: which agents, as in `new_agents`.
    twin_steps: of the static twin beforehand, from whose logits the agents then start, as in the demo; 0 for none. The
    twin is trained by the base recipe, once per seed for all variants.
    """

    config: TrainingConfig = field(default_factory=TrainingConfig)
    policy: str = "mixture"
    hidden_dim: int | None = None
    features: str = "both"
    bucket: int | None = None
    twin_steps: int = 0

    def changed(self, name: str, value: Any) -> "Recipe":
        """The recipe with one thing changed. Raises ConfigError for an unknown name or a value out of range."""
        own = ("policy", "hidden_dim", "features", "bucket", "twin_steps")
        known = [*own, *(f.name for f in fields(TrainingConfig))]
        if name not in known:
            raise ConfigError(f"a recipe has no {name}; choose from {', '.join(known)}")
        word = isinstance(getattr(self if name in own else self.config, name), str)
        parts = value if isinstance(value, tuple) else (value,)
        if not all(part is None or isinstance(part, str) == word for part in parts):
            raise ConfigError(f"{name}={value!r} was given; it must be {'a word' if word else 'a number'}")
        if name == "policy" and value not in TRAINED_ON_INPUT:
            raise ConfigError(f"policy={value!r} is unknown; choose {' or '.join(TRAINED_ON_INPUT)}")
        if name in own:
            return replace(self, **{name: value})
        if name == "alpha":  # which is not used where a multiplier steers to a keep ratio
            ends = value if isinstance(value, tuple) else (min(self.config.alpha[0], value), value)
            return replace(self, config=replace(self.config, alpha=ends, keep_ratio=None))
        if name == "temperature" and not isinstance(value, tuple):
            value = (value, value)
        return replace(self, config=replace(self.config, **{name: value}))


@dataclass(frozen=True)
class Variant:
    """A recipe and what sets it apart from the base, nothing for the base itself."""

    recipe: Recipe
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.changes.items()) or "base"


@dataclass(frozen=True)
class Ground:
    """What all cells share: the model, prompts to answer (bench) and prompts to set the dial on.

    load: the model once more, for cells that train LoRA into it. at: the keep ratio at which all are compared. own:
    whether each is judged at the keep ratio that its training led to as well, for about half of the judging's time.
    """

    load: Load
    bench: Bench
    dial: Bench
    at: float
    folder: Path
    data_dir: Path | None = None
    own: bool = True


def variants(
    base: Recipe,
    factors: Mapping[str, Sequence[Any]],
    *,
    full_grid: bool = False,
    usual_bucket: int | None = None,
) -> list[Variant]:
    """The base first, then one change at a time, or every combination; none twice.

    usual_bucket: what a bucket of None comes to in this model. Raises ConfigError for an unknown factor or a value out
    of range.
    """
    same = _resolved(base, usual_bucket)
    found = {same: Variant(base)}
    for changes in _combinations(factors) if full_grid else _one_at_a_time(factors):
        recipe = base
        for name, value in changes.items():
            recipe = recipe.changed(name, value)
        told = {n: v for n, v in changes.items() if _resolved(base.changed(n, v), usual_bucket) != same}
        found.setdefault(_resolved(recipe, usual_bucket), Variant(recipe, told))
    return list(found.values())


def _resolved(recipe: Recipe, usual_bucket: int | None) -> Recipe:
    """The recipe with what is usual written as None."""
    recipe = replace(recipe, bucket=None) if recipe.bucket == usual_bucket else recipe
    usual = recipe.hidden_dim == TRAINED_ON_INPUT[recipe.policy].usual_hidden_dim
    return replace(recipe, hidden_dim=None) if usual else recipe


def _one_at_a_time(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for name, values in factors.items():
        yield from ({name: value} for value in values)


def _combinations(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def ablate(
    ground: Ground,
    wanted: Sequence[Variant],
    seeds: Sequence[int],
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and judge every variant with every seed; what is in the ledger is not done again. Returns the summary."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={list(seeds)} was given; give at least one and none twice")
    if not 0 < ground.at < 1:
        raise ConfigError(f"keep_ratio={ground.at} was given; the one that all are compared at lies between 0 and 1")
    ledger, cells = ledger or Ledger(), []
    for done, (variant, seed) in enumerate(product(wanted, seeds)):
        if progress:
            progress("cells", done, len(wanted) * len(seeds))
        key = {"recipe": json.loads(json.dumps(asdict(variant.recipe))), "seed": seed, "at": ground.at}
        key |= {"own": ground.own, "base": json.loads(json.dumps(asdict(wanted[0].recipe)))}
        start = partial(_start, ground, wanted[0].recipe, variant.recipe.twin_steps, seed, ledger, progress)
        cells.append(ledger.get(key, partial(_cell, ground, variant.recipe, seed, start, progress)))
    by_variant = [cells[start : start + len(seeds)] for start in range(0, len(cells), len(seeds))]
    return summarise(list(wanted), by_variant, seeds, ground.at)


def _start(
    ground: Ground, base: Recipe, steps: int, seed: int, ledger: Ledger, progress: Progress | None
) -> list[list[float]]:
    """Logits of a static twin of the base recipe, per site, trained or from the ledger; none without steps."""
    if not steps:
        return []
    config = replace(
        base.config, max_steps=steps, learning_rate=TWIN_LEARNING_RATE, lora="none", noise=(1.0, 0.0), ramp=0.7
    )
    config = replace(config, seed=seed, patience=0)

    def work() -> list[list[float]]:
        folder = ground.folder / f"twin-{seed}"
        told = _told(progress, "static twin", steps)
        twin = StaticPolicy.all_kept([site.geometry for site in find_sites(ground.bench.model)])
        train_policy(ground.bench, twin, config, folder, bucket=base.bucket, data_dir=ground.data_dir, on_log=told)
        return [x.tolist() for x in twin.logits]

    key = {"twin": json.loads(json.dumps(asdict(config))), "bucket": base.bucket}
    logits: list[list[float]] = ledger.get(key, work)
    return logits


def _told(progress: Progress | None, name: str, steps: int) -> Callable[[dict[str, Any]], None] | None:
    return (lambda row: progress(name, row["step"], max(row["step"], steps))) if progress else None


def _cell(
    ground: Ground,
    recipe: Recipe,
    seed: int,
    start: Callable[[], list[list[float]]],
    progress: Progress | None,
) -> dict[str, Any]:
    """Train agents with one recipe and seed and judge them; the run's folder goes when it is finished."""
    logits = start()
    trains_model = recipe.config.lora != "none"
    model, tokenizer = ground.load() if trains_model else (ground.bench.model, ground.bench.tokenizer)
    geometries = [site.geometry for site in find_sites(model)]
    config = replace(recipe.config, seed=seed)
    torch.manual_seed(seed)
    policy = new_agents(recipe.policy, geometries, hidden_dim=recipe.hidden_dim, features=recipe.features)
    if logits:
        policy.start_from([torch.tensor(site) for site in logits], limit=UNSURE)
    run = ground.folder / _name(recipe, seed)
    result = train(
        model,
        tokenizer,
        ground.bench.task,
        policy,
        config,
        output_dir=run,
        look=ground.bench.look,
        bucket=recipe.bucket,
        data_dir=ground.data_dir,
        resume=(run / TOLD).is_file(),
        quiet=True,
        on_log=_told(progress, "training", config.max_steps),
    )
    own = replace(ground.bench, model=result.model, tokenizer=tokenizer, fill=config.fill)
    dial = replace(own, examples=ground.dial.examples)
    gate = Gate(bucket=recipe.bucket)
    at = replace(gate, threshold=threshold_for(dial.logits(result.policy), geometries, ground.at, recipe.bucket))
    gates = {"own": gate, "at": at} if ground.own else {"at": at}
    judged = {name: _judged(own, result.policy, how, progress) for name, how in gates.items()}
    shutil.rmtree(run, ignore_errors=True)
    return {**judged, "seconds": result.seconds, "agent_parameters": sum(p.numel() for p in result.policy.parameters())}


def _judged(bench: Bench, policy: Any, gate: Gate, progress: Progress | None) -> dict[str, Any]:
    update = (lambda done, total: progress("answers", done, total)) if progress else None
    losses = answer_losses(
        bench.model,
        bench.tokenizer,
        bench.examples,
        policy,
        template=bench.task.template,
        gate=gate,
        look=bench.look,
        fill=bench.fill,
        scope=bench.scope,
        batch_size=bench.batch_size,
    )
    return {**as_json(bench.answers(policy, gate, update)), "losses": losses}


def summarise(
    wanted: Sequence[Variant], cells: Sequence[Sequence[Mapping[str, Any]]], seeds: Sequence[int], at: float
) -> dict[str, Any]:
    """`rows`, one per variant, the base first: at the common keep ratio, at its own, and against the base.

    `cells` holds one cell per seed of each variant.
    """
    own = "own" in cells[0][0]
    tables = [{name: _tables(part, name) for name in (("at", "own") if own else ("at",))} for part in cells]
    rows = [
        {
            "variant": variant.name,
            "changes": dict(variant.changes),
            **_figures(*table["at"]),
            **({f"own_{name}": value for name, value in _figures(*table["own"]).items()} if own else {}),
            "seconds": float(np.mean([cell["seconds"] for cell in part])),
            "agent_parameters": part[0]["agent_parameters"],
        }
        for variant, table, part in zip(wanted, tables, cells, strict=True)
    ]
    tests = [crossed_difference(table["at"][1], tables[0]["at"][1]) for table in tables[1:]]
    losses = [crossed_difference(table["at"][2], tables[0]["at"][2]) for table in tables[1:]]
    adjusted = holm([test.p_value for test in tests])
    for row, test, loss, p_holm in zip(rows[1:], tests, losses, adjusted, strict=True):
        row |= {"diff": test.diff, "diff_ci95": list(test.ci95), "p_value": test.p_value, "p_holm": p_holm}
        row |= {"loss_diff": loss.diff, "loss_diff_ci95": list(loss.ci95)}
    prompts = len(cells[0][0]["at"]["answers"])
    return {
        "rows": rows,
        "base": asdict(wanted[0].recipe),
        "at_keep_ratio": at,
        "seeds": list(seeds),
        "prompts": prompts,
    }


def _tables(part: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Evaluation], Any, Any]:
    """Evaluations, right answers (S, N) and losses (S, N) of one variant."""
    runs = [from_json({key: cell[name][key] for key in ("answers", "seconds")}) for cell in part]
    correct = np.array([[float(answer.correct) for answer in run.answers] for run in runs])
    return runs, correct, np.array([cell[name]["losses"] for cell in part])


def _figures(runs: Sequence[Evaluation], correct: Any, losses: Any) -> dict[str, Any]:
    accuracy, loss = crossed_mean(correct), crossed_mean(losses)
    one = len(runs) == 1 or float(np.ptp(correct)) == 0
    return {
        "keep_ratio": float(np.mean([1 - run.sparsity for run in runs])),
        "accuracy": accuracy.mean,
        "ci95": list(wilson_ci(int(correct[0].sum()), correct.shape[1]) if one else accuracy.ci95),
        "loss": loss.mean,
        "loss_ci95": list(loss.ci95),
    }


def _name(recipe: Recipe, seed: int) -> str:
    """Of a cell's folder, the same in every run."""
    return hashlib.sha256(json.dumps([asdict(recipe), seed]).encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    return "heads / 8" if value is None else str(value)
