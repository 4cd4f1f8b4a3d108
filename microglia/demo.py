"""The main job on real problems in ten minutes: agents, their static twin and random masks on the embedded reasoner."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from microglia.benchmark import Plan, benchmark, text_subject
from microglia.checkpoint import check_writable
from microglia.evaluation.bench import Bench
from microglia.evaluation.run import Evaluation, evaluate, follows_difficulty, paired
from microglia.gate import Gate, threshold_for
from microglia.look import Look
from microglia.models import REASONER, load_model
from microglia.pair import PairRecipe, save, train_pair
from microglia.policy import Policy, StaticPolicy
from microglia.sites import find_sites
from microglia.tasks import get_task
from microglia.training import TrainingConfig

RANDOM_MASKS = 2  # each answers its share of the problems; they hardly ever stop by themselves, which takes long
KEEP_RATIO = 0.75  # the dial: the lowest that `calibrate --max-drop 0.01` promised on 1,000 validation problems
SCARCE = 0.5  # and once more where heads are scarce, agents against twin
DIAL_PROMPTS = 200  # validation problems on which the dial is set
TWIN_LEARNING_RATE = 0.1  # of a free logit per head; an MLP's would leave it where it began


FIRST = TrainingConfig(
    max_steps=100,
    batch_size=32,
    limit=3200,
    learning_rate=TWIN_LEARNING_RATE,
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
    quiet: bool = False,
) -> dict[str, Any]:
    """Train; answer the same held-out problems dense, pruned, with the static twin and with random masks of the same
    sparsity; write `summary.json`, the answers and checkpoints of agents and twin to `output_dir`. Returns the
    summary."""
    started, folder = time.monotonic(), Path(output_dir)
    check_writable(folder)
    model, tokenizer = load_model(REASONER)
    task, look, gate = get_task("arithmetic"), Look(), Gate()
    geometries = [site.geometry for site in find_sites(model)]
    dial = Bench(model, tokenizer, task, task.load("validation", limit=DIAL_PROMPTS, seed=seed), look=look)
    pair = train_pair(dial, recipe, seed, folder / "training", tell=tell, quiet=quiet)
    agents = pair.agents

    def at(policy: Policy, target: float) -> Gate:
        """The gate that keeps so many heads of the validation problems, or a few more."""
        return replace(gate, threshold=threshold_for(dial.logits(policy), geometries, target))

    masks = [StaticPolicy.random(geometries, seed=seed + i) for i in range(RANDOM_MASKS)]
    policies: dict[str, Policy] = {"pruned": agents, "static": pair.twin}
    policies |= {f"random {i + 1}": mask for i, mask in enumerate(masks)}
    variants: dict[str, tuple[Policy | None, Gate]] = {"dense": (None, gate)}
    variants |= {name: (policy, at(policy, KEEP_RATIO)) for name, policy in policies.items()}
    variants |= {f"{name}, scarce": (policies[name], at(policies[name], SCARCE)) for name in ("pruned", "static")}

    examples = task.load("test", limit=problems, seed=seed)
    runs: dict[str, Evaluation] = {}
    for name, (policy, how) in variants.items():
        runs[name] = evaluate(
            model,
            tokenizer,
            task,
            examples[: len(examples) // RANDOM_MASKS] if name.startswith("random") else examples,
            policy,
            gate=how,
            look=look,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=(lambda done, total, name=name: progress(name, done, total)) if progress else None,  # type: ignore[misc]
        )
        tell(f"{name}: {runs[name].accuracy:.1%} right at sparsity {runs[name].sparsity:.1%}")
    tell("measuring time and memory")
    plan = Plan(batch_sizes=(1,), contexts=(96,), keep_ratios=(None,), new_tokens=64, num_runs=20)
    pruning = variants["pruned"][1]
    subject = text_subject(agents, lambda _: pruning, tokenizer, [prompt + "\n" for prompt in dial.prompts], look=look)
    measured = benchmark(model, subject, plan, {"model": REASONER, "seed": seed})
    parameters = sum(p.numel() for p in agents.parameters())
    summary = summarise(runs) | {
        "latency": [asdict(row) for row in measured.rows],
        "agent_parameters": parameters,
        "agent_share": parameters / sum(p.numel() for p in model.parameters()),
        "seconds": time.monotonic() - started,
        "problems": problems,
        "seed": seed,
        "circumstances": measured.circumstances,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "history.json").write_text(json.dumps(pair.history, indent=2) + "\n")
    (folder / "answers.json").write_text(json.dumps({name: run.rows() for name, run in runs.items()}) + "\n")
    training = {"dataset": task.name, "config": asdict(recipe.of_seed(seed).second)}
    for name, which in {"checkpoint": "pruned", "static-twin": "static"}.items():
        save(dial, policies[which], folder / name, variants[which][1], base_model=REASONER, training=training)
    return summary


def summarise(runs: dict[str, Evaluation]) -> dict[str, Any]:
    """The figures of the demo from its evaluations; every difference is paired on the same problems."""
    dense, pruned, static = runs["dense"], runs["pruned"], runs["static"]
    random = [run for name, run in runs.items() if name.startswith("random")]
    few, few_static = runs["pruned, scarce"], runs["static, scarce"]
    return {
        "dense": dense.summary(),
        "pruned": pruned.summary() | paired(dense, pruned),
        "static": static.summary() | paired(dense, static),
        "random": {
            "accuracy": sum(run.accuracy for run in random) / len(random),
            "sparsity": sum(run.sparsity for run in random) / len(random),
            "masks": [run.summary() for run in random],
        },
        "adaptivity": adaptivity(static, pruned),
        "scarce": {
            "pruned": few.summary() | paired(dense, few),
            "static": few_static.summary() | paired(dense, few_static),
            "adaptivity": adaptivity(few_static, few),
        },
        "sparsity_follows_difficulty": follows_difficulty(pruned),
    }


def adaptivity(static: Evaluation, agents: Evaluation) -> dict[str, Any]:
    """What looking at the prompt adds to the static twin, in shares of right answers."""
    found = paired(static, agents)
    return {"gain": found["diff"], "ci95": found["diff_ci95"], "p_value": found["p_value"]}
