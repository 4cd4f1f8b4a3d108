"""What each part of the recipe is worth: train with one thing changed at a time, or all combinations, and compare.

Every run is judged twice on the same prompts: at the keep ratio that its training led to, and at one keep ratio
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
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from microglia.errors import ConfigError
from microglia.evaluation.crossed import crossed_difference, holm_corrected
from microglia.evaluation.setup import Setup
from microglia.experiments.measure import Measured, Progress, figures, losses, measure, right
from microglia.experiments.side_by_side import agents_from
from microglia.gate import Gate
from microglia.ledger import Ledger
from microglia.policies import LearnedPolicy, Policy, StaticPolicy, agent_kinds
from microglia.policies.base import POLICIES
from microglia.pruner import Fill, Pruner
from microglia.registry import listed
from microglia.results import AblationResult, AblationRow, plain
from microglia.signals import check_signals
from microglia.tasks.used import fingerprint
from microglia.training import RunFolder, TrainingConfig, train
from microglia.training.loop import SETTINGS, examples_of
from microglia.training.static_baseline import baseline_config, new_static_baseline, train_in_memory

Load = Callable[[], tuple[Any, PreTrainedTokenizerBase]]

# What is varied unless something else is asked for. alpha is the curriculum's end; bucket None is heads / 8.
FACTORS: dict[str, tuple[Any, ...]] = {
    "alpha": (0.1, 0.3, 1.0),
    "beta": (0.0, 0.01, 0.1),
    "temperature": (0.5, 1.0, 2.0),
    "policy": ("mixture", "agents"),
    "hidden_dim": (4, 16, 64),
    "signals": ("norm+entropy", "norm", "entropy"),
    "fill": ("zero", "mean"),
    "bucket": (None, 1, 4),
    "lora": ("none", "first", "joint"),
}


@dataclass(frozen=True)
class Recipe:
    """A training and the agents that are trained.

    policy, hidden_dim: which agents, as in `new_agents`.
    baseline_steps: of the static baseline beforehand, from whose logits the agents then start, as in the demo; 0 for
    none. The baseline is trained by the base recipe, once per seed for all variants.
    """

    config: TrainingConfig = field(default_factory=TrainingConfig)
    policy: str = "mixture"
    hidden_dim: int | None = None
    signals: str = "norm+entropy"
    fill: Fill = "zero"
    bucket: int | None = None
    baseline_steps: int = 0

    def changed(self, name: str, value: Any) -> "Recipe":
        """The recipe with one thing changed. Raises ConfigError for an unknown name or a value out of range."""
        here = ("policy", "hidden_dim", "signals", "fill", "bucket", "baseline_steps")
        known = [*here, *(f.name for f in fields(TrainingConfig))]
        if name not in known:
            raise ConfigError(f"a recipe has no {name}; choose from {', '.join(known)}")
        word = isinstance(getattr(self if name in here else self.config, name), str)
        parts = value if isinstance(value, tuple) else (value,)
        if not all(part is None or isinstance(part, str) == word for part in parts):
            raise ConfigError(f"{name}={value!r} was given; it must be {'a word' if word else 'a number'}")
        if name == "signals":
            value = "+".join(check_signals(value))  # commas stand between variants
        choices = {"policy": agent_kinds(), "fill": list(get_args(Fill))}
        if name in choices and value not in choices[name]:
            raise ConfigError(f"{name}={value!r} is unknown; choose {listed(choices[name])}")
        if name in here:
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
class Ablation:
    """What all runs share: the model, prompts to answer (setup) and others on which a keep ratio becomes a threshold.

    load: the model once more, for runs that train LoRA into it. at: the keep ratio at which all are compared.
    as_trained: whether each is judged at the keep ratio that its training led to as well, for about half of the
    judging's time.
    """

    load: Load
    setup: Setup
    held_out: Setup
    at: float
    folder: Path
    data_dir: Path | None = None
    as_trained: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    progress: Progress | None = None

    def data(self, config: TrainingConfig, seed: int) -> str:
        """Which examples a training draws with a seed."""
        parts = examples_of(self.setup.task, replace(config, seed=seed), self.data_dir)
        return fingerprint([example for part in parts for example in part])

    def on_log(self, name: str, steps: int) -> Callable[[dict[str, Any]], None] | None:
        """Shows the steps of a training."""
        progress = self.progress
        return (lambda row: progress(name, row["step"], max(row["step"], steps))) if progress else None


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
    recipes = {same: Variant(base)}
    for changes in _combinations(factors) if full_grid else _one_at_a_time(factors):
        recipe = base
        for name, value in changes.items():
            recipe = recipe.changed(name, value)
        real = {n: v for n, v in changes.items() if _resolved(base.changed(n, v), usual_bucket) != same}
        recipes.setdefault(_resolved(recipe, usual_bucket), Variant(recipe, real))
    return list(recipes.values())


def _resolved(recipe: Recipe, usual_bucket: int | None) -> Recipe:
    """The recipe with what is usual written as None."""
    recipe = replace(recipe, bucket=None) if recipe.bucket == usual_bucket else recipe
    kind = POLICIES[recipe.policy]
    usual = issubclass(kind, LearnedPolicy) and recipe.hidden_dim == kind.default_hidden_dim
    return replace(recipe, hidden_dim=None) if usual else recipe


def _one_at_a_time(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for name, values in factors.items():
        yield from ({name: value} for value in values)


def _combinations(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def ablate(ablation: Ablation, wanted: Sequence[Variant], seeds: Sequence[int]) -> AblationResult:
    """Train and judge every variant with every seed; what is in the ledger is not done again."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={list(seeds)} was given; give at least one and none twice")
    if not 0 < ablation.at < 1:
        raise ConfigError(f"keep_ratio={ablation.at} was given; the one that all are compared at lies between 0 and 1")
    base, runs = wanted[0].recipe, []
    prompts = {"prompts": ablation.setup.identity, "held_out": ablation.held_out.identity}
    ablation = replace(ablation, ledger=ablation.ledger.within(**prompts))
    for done, (variant, seed) in enumerate(product(wanted, seeds)):
        if ablation.progress:
            ablation.progress("runs", done, len(wanted) * len(seeds))
        key = {"recipe": plain(asdict(variant.recipe)), "seed": seed, "at": ablation.at}
        key |= {"as_trained": ablation.as_trained, "base": plain(asdict(base))}
        key |= {"data": [ablation.data(recipe.config, seed) for recipe in (base, variant.recipe)]}
        runs.append(ablation.ledger.get(key, partial(_run, ablation, base, variant.recipe, seed)))
    by_variant = [runs[start : start + len(seeds)] for start in range(0, len(runs), len(seeds))]
    return summarise(wanted, by_variant, seeds, ablation.at)


def _baseline(ablation: Ablation, base: Recipe, steps: int, seed: int) -> Policy | None:
    """The static baseline of the base recipe, trained or from the ledger; none without steps."""
    if not steps:
        return None
    config = baseline_config(base.config, max_steps=steps, noise=(1.0, 0.0), ramp=0.7, seed=seed)
    setup, on_log = ablation.setup, ablation.on_log("static baseline", steps)

    def train_baseline() -> list[list[float]]:
        baseline = new_static_baseline(setup.model, Gate(bucket=base.bucket), base.fill)
        place = (setup.model, setup.tokenizer, setup.task)
        train_in_memory(*place, baseline, config, data_dir=ablation.data_dir, on_log=on_log)
        assert isinstance(baseline.policy, StaticPolicy)
        return [x.tolist() for x in baseline.policy.logits]

    key = {"static_baseline": plain(asdict(config)), "bucket": base.bucket, "fill": base.fill}
    key |= {"data": ablation.data(config, seed)}
    logits = ablation.ledger.get(key, train_baseline)
    return StaticPolicy([torch.tensor(site) for site in logits])


def _run(ablation: Ablation, base: Recipe, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train agents with one recipe and seed and judge them; the run's folder goes when it is finished."""
    baseline = _baseline(ablation, base, recipe.baseline_steps, seed)
    setup, config = ablation.setup, replace(recipe.config, seed=seed)
    if config.lora != "none":
        model, tokenizer = ablation.load()
        setup = replace(setup, model=model, tokenizer=tokenizer)
    like = new_static_baseline(setup.model, Gate(bucket=recipe.bucket)) if baseline is None else Pruner(baseline)
    like = replace(like, gate=Gate(bucket=recipe.bucket), fill=recipe.fill)
    options: dict[str, Any] = {"hidden_dim": recipe.hidden_dim, "signals": recipe.signals}
    agents = agents_from(like, setup, seed, recipe.policy, warm=baseline is not None, **options)
    identity = json.dumps([asdict(recipe), seed, ablation.data(config, seed)])
    folder = ablation.folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
    on_log = ablation.on_log("training", config.max_steps)
    run = RunFolder(folder, resume=(folder / SETTINGS).is_file(), quiet=True, on_log=on_log)
    result = train(setup.model, setup.tokenizer, setup.task, agents, config, run, data_dir=ablation.data_dir)
    setup = replace(setup, model=result.model)
    pruner = replace(setup, examples=ablation.held_out.examples).calibrated(result.pruner)
    targets = {"at": ablation.at} | ({"as_trained": None} if ablation.as_trained else {})
    judged = {name: measure(setup, pruner.at(ratio), ablation.progress) for name, ratio in targets.items()}
    shutil.rmtree(folder, ignore_errors=True)
    parameters = sum(p.numel() for p in result.pruner.policy.parameters())
    return {**judged, "seconds": result.seconds, "agent_parameters": parameters}


def summarise(
    wanted: Sequence[Variant], runs: Sequence[Sequence[Mapping[str, Any]]], seeds: Sequence[int], at: float
) -> AblationResult:
    """One row per variant, the base first: at the common keep ratio, as trained, and against the base.

    `runs` holds, for each variant, what each seed gave.
    """
    common = [[Measured.from_json(run["at"]) for run in part] for part in runs]
    tests = holm_corrected([crossed_difference(right(part), right(common[0])) for part in common[1:]])
    rows = []
    for variant, part, measured, test in zip(wanted, runs, common, [None, *tests], strict=True):
        as_trained = [Measured.from_json(run["as_trained"]) for run in part if "as_trained" in run]
        rows.append(
            AblationRow(
                variant=variant.name,
                changes=plain(variant.changes),
                **asdict(figures(measured)),
                as_trained=figures(as_trained) if as_trained else None,
                seconds=float(np.mean([run["seconds"] for run in part])),
                agent_parameters=part[0]["agent_parameters"],
                to_base=test,
                loss_to_base=test and crossed_difference(losses(measured), losses(common[0])),
            )
        )
    prompts = right(common[0]).shape[1]
    base = plain(asdict(wanted[0].recipe))
    return AblationResult(rows=tuple(rows), base=base, at_keep_ratio=at, seeds=tuple(seeds), prompts=prompts)


def _shown(value: Any) -> str:
    return "heads / 8" if value is None else str(value)
