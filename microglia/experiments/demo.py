"""The main job on real problems in ten minutes: agents, their static baseline and random masks on the reasoner."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from microglia.anatomy import input_device
from microglia.benchmark import TimedRun, fixed_prompts, request_time, step_time, time_requests
from microglia.checkpoint import check_writable
from microglia.evaluation.run import Evaluation, follows_difficulty, paired
from microglia.evaluation.setup import Setup
from microglia.experiments.side_by_side import BASELINE, PairRecipe, questions, save, train_pair
from microglia.models import REASONER, load_model
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.record import circumstances
from microglia.results import Adaptivity, AtBudget, Circumstances, DemoResult, RandomMasks
from microglia.tasks import get_task
from microglia.training import TrainingConfig
from microglia.training.static_baseline import LEARNING_RATE
from microglia.units import find_sites

RANDOM_MASKS = 2  # each answers its share of the problems; they hardly ever stop by themselves, which takes long
KEEP_RATIO = 0.75  # the lowest that `calibrate --max-drop 0.01` promised on 1,000 validation problems
LOW_BUDGET = 0.5  # and once more with fewer heads, agents against static baseline
HELD_OUT = 200  # validation problems on which keep ratios become thresholds


FIRST = TrainingConfig(
    max_steps=100,
    batch_size=32,
    limit=3200,
    learning_rate=LEARNING_RATE,
    keep_ratio=0.5,
    ramp=0.7,
    save_steps=10_000,
)
SECOND = replace(FIRST, max_steps=150, limit=4800, ramp=0.0, learning_rate=1e-2, noise=(0.3, 0.0))
RECIPE = PairRecipe(FIRST, SECOND)


def demo(
    output_dir: Path | str = "runs/demo",
    *,
    recipe: PairRecipe = RECIPE,
    problems: int = 500,
    batch_size: int = 100,
    max_new_tokens: int = 144,
    seed: int = 0,
    tell: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] | None = None,
) -> DemoResult:
    """Train; answer the same held-out problems dense, pruned, with the static baseline and with random masks of the
    same sparsity; write `summary.json`, the answers and both checkpoints to `output_dir`."""
    started, folder = time.monotonic(), Path(output_dir)
    check_writable(folder)
    model, tokenizer = load_model(REASONER)
    task, geometries = get_task("arithmetic"), [site.geometry for site in find_sites(model)]
    held_out = Setup(model, tokenizer, task, task.load("validation", limit=HELD_OUT, seed=seed))
    pair = train_pair(held_out, recipe, seed, tell=tell, quiet=progress is None)

    policies = {"pruned": pair.agents, "static baseline": pair.static_baseline}
    masks = {f"random {i + 1}": Pruner(StaticPolicy.random(geometries, seed=seed + i)) for i in range(RANDOM_MASKS)}
    pruners = {name: held_out.calibrated(pruner) for name, pruner in {**policies, **masks}.items()}
    variants: dict[str, Pruner | None] = {"dense": None}
    variants |= {name: pruner.at(KEEP_RATIO) for name, pruner in pruners.items()}
    variants |= {f"{name}, low budget": pruners[name].at(LOW_BUDGET) for name in policies}

    examples = task.load("test", limit=problems, seed=seed)
    setup = replace(held_out, examples=examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    shares = dict(zip(masks, shared_out(examples, RANDOM_MASKS), strict=True))
    runs: dict[str, Evaluation] = {}
    for name, pruner in variants.items():
        update = (lambda done, total, name=name: progress(name, done, total)) if progress else None
        runs[name] = replace(setup, examples=shares.get(name, examples)).answers(pruner, update)
        tell(f"{name}: {runs[name].accuracy:.1%} right at sparsity {runs[name].sparsity:.1%}")
    tell("measuring time and memory")
    chosen = {name: pruners[name].at(KEEP_RATIO) for name in policies}
    timed = _timed(setup, runs["dense"], chosen, seed)
    parameters = sum(p.numel() for p in pair.agents.policy.parameters())
    result = DemoResult(
        **compared(runs),
        requests={name: request_time([run]) for name, run in timed.items()},
        steps={name: step_time([run]) for name, run in timed.items()},
        agent_parameters=parameters,
        agent_share=parameters / sum(p.numel() for p in model.parameters()),
        seconds=time.monotonic() - started,
        problems=problems,
        seed=seed,
        circumstances=Circumstances(**circumstances(input_device(model))),
    )
    (folder / "summary.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    (folder / "history.json").write_text(json.dumps(pair.history, indent=2) + "\n")
    (folder / "answers.json").write_text(json.dumps({name: run.rows() for name, run in runs.items()}) + "\n")
    of_seed = recipe.of_seed(seed)
    training = {"dataset": task.name, "first": asdict(of_seed.first), "config": asdict(of_seed.second)}
    for name, place in {"pruned": "checkpoint", "static baseline": BASELINE}.items():
        used = questions(held_out, of_seed)
        save(held_out, chosen[name], folder / place, base_model=REASONER, training=training, used=used)
    return result


def shared_out(examples: Sequence[Any], parts: int) -> list[list[Any]]:
    """Consecutive parts of about the same size, all examples where there are fewer than parts."""
    ends = [len(examples) * part // parts for part in range(parts + 1)]
    return [list(examples[start:end] or examples) for start, end in pairwise(ends)]


def _timed(setup: Setup, dense: Evaluation, pruners: dict[str, Pruner], seed: int) -> dict[str, TimedRun]:
    """Requests as long as the dense answers, of the dense model against itself (A/A) and of each pruner against it."""
    lengths = [answer.new_tokens for answer in dense.answers]
    prompts = fixed_prompts(setup.model, setup.tokenizer, setup.prompts, lengths, seed=seed)
    return {
        name.replace(" ", "_"): time_requests(setup.model, prompts, pruner)
        for name, pruner in {"dense": None, **pruners}.items()
    }


def compared(runs: dict[str, Evaluation]) -> dict[str, Any]:
    """The figures of the demo from its evaluations; every difference is paired on the same problems."""
    dense, pruned, baseline = runs["dense"], runs["pruned"], runs["static baseline"]
    low, low_baseline = runs["pruned, low budget"], runs["static baseline, low budget"]
    random = [run for name, run in runs.items() if name.startswith("random")]
    return {
        "dense": dense.summary(),
        "pruned": pruned.summary(dense),
        "static_baseline": baseline.summary(dense),
        "random": RandomMasks(
            accuracy=sum(run.accuracy for run in random) / len(random),
            sparsity=sum(run.sparsity for run in random) / len(random),
            masks=tuple(run.summary() for run in random),
        ),
        "adaptivity": adaptivity(baseline, pruned, KEEP_RATIO),
        "low_budget": AtBudget(
            pruned=low.summary(dense),
            static_baseline=low_baseline.summary(dense),
            adaptivity=adaptivity(low_baseline, low, LOW_BUDGET),
        ),
        "follows_difficulty": follows_difficulty(pruned),
    }


def adaptivity(baseline: Evaluation, agents: Evaluation, target: float) -> Adaptivity:
    """What deciding by the prompt adds to the static baseline, in shares of right answers."""
    test = paired(baseline, agents)
    runs = {"agents": agents, "static_baseline": baseline}
    return Adaptivity(
        gain=test.diff,
        ci95=test.ci95,
        p_value=test.p_value,
        target=target,
        keep_ratios={name: 1 - run.sparsity for name, run in runs.items()},
        keep_ratios_per_token={name: 1 - run.sparsity_per_token for name, run in runs.items()},
    )
