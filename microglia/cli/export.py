"""`microglia export`: one keep plan frozen into a smaller model for other runtimes."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.verb import Outcome, facts, progress, verb
from microglia.errors import ConfigError

NOT_MEASURED = "not measured, and not the checkpoint's; say --evaluate N to compare on N test problems"


TASK = Fields(without=("shots", "question_field", "answer_field"), defaults={"dataset": "what it was trained on"})


@verb()
def export(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder that `train` wrote, or a hub id.")] = None,
    *,
    format: Annotated[Literal["hf", "onnx", "gguf"], "Format of the files."] = "hf",
    plan: Annotated[
        Literal["mean", "task", "prompt"], "Keep what is kept on average, for a task, or for one prompt."
    ] = "mean",
    output_dir: Annotated[Path, "An empty or a new folder."] = Path("exported"),
    prompt: Annotated[str | None, "The question of --plan prompt."] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts of --plan task.")] = 64,
    keep_ratio: o.KeepRatio = None,
    evaluate: Annotated[
        int, typer.Option(min=0, help="Number of test examples on which to compare with the dense model.")
    ] = 0,
    check: Annotated[bool, "Read the export back and compare."] = True,
    model_path: o.CheckpointPath = None,
    seed: o.Seed = 0,
    task_options: Annotated[o.TaskOptions, TASK] = o.TaskOptions(dataset=""),
    generation: Annotated[o.Generation, Fields(without=("execution",))],
    loading: Annotated[o.Loading, Fields(without=("quantize",), defaults={"dtype": "as stored; onnx: float32"})],
) -> Outcome:
    """Freeze one keep plan into a smaller model: for transformers, lm-eval and vLLM, ONNX Runtime or llama.cpp.

    microglia export checkpoints --format hf --plan mean --output-dir exported

    microglia export checkpoints --format gguf --plan task --dataset gsm8k --evaluate 200
    """
    from microglia.evaluation.setup import Setup
    from microglia.export import accuracy_kept
    from microglia.export import export as write
    from microglia.export.run import check_folder
    from microglia.tasks import get_task

    check_plan(plan, prompt)
    check_folder(output_dir)
    dtype = loading.dtype or ("float32" if format == "onnx" else "auto")
    system = loading.system(checkpoint or model_path, dtype=dtype)
    task = get_task(task_options.dataset or system.training.get("dataset", "arithmetic"))
    if plan == "task":
        drawn = task.load("validation", limit=limit, seed=seed, data_dir=task_options.data_dir)
        questions = [example.question for example in drawn]
    else:
        questions = [] if prompt is None else [prompt]
    chosen = keep_plan(system, plan, questions, keep_ratio)
    accuracy = None
    if evaluate:
        examples = task.load("test", limit=evaluate, seed=seed, data_dir=task_options.data_dir)
        setup = Setup(system.model, system.tokenizer, task, examples, **generation.how())
        with progress("evaluating") as update:
            accuracy = accuracy_kept(setup, chosen, system.pruner, update)
    about = {"base_model": system.source, "template": system.template, "accuracy": accuracy}
    exported = write(system.model, system.tokenizer, chosen, output_dir, format=format, check=check, details=about)
    result = exported.result(chosen, **about)
    return Outcome(result.to_json(), views(result))


def check_plan(kind: str, prompt: str | None) -> None:
    """Raise ConfigError for a plan with a prompt too many or too few."""
    if (prompt is not None) != (kind == "prompt"):
        raise ConfigError(
            f"plan={kind!r} was given {'no' if prompt is None else 'a'} prompt; --prompt goes with --plan prompt"
        )


def keep_plan(system: Any, kind: str, questions: list[str], ratio: float | None) -> Any:
    """The plan of this kind for a system, at another keep ratio if one is given."""
    from microglia.export import KeepPlan
    from microglia.reading import read_prompts
    from microglia.tasks.prompts import render_prompt
    from microglia.units import find_sites

    if system.pruner.fill != "zero":
        raise ConfigError(
            f"this checkpoint fills pruned heads with their {system.pruner.fill} over each prompt, which cannot be "
            "frozen; train with fill zero"
        )
    if ratio is not None:
        system.set_keep_ratio(ratio, questions if kind == "task" else None)
    pruner = system.pruner
    if kind == "mean":
        return KeepPlan.of_prompts(kind, pruner.budget, pruner.gate)
    prompts = [render_prompt(system.tokenizer, question, system.template) for question in questions]
    logits = read_prompts(system.model, system.tokenizer, prompts, pruner).logits
    budget = pruner.with_budget(logits, [site.geometry for site in find_sites(system.model)]).budget
    if kind == "prompt":
        return KeepPlan.of_prompt(budget, pruner.gate)
    return KeepPlan.of_prompts(kind, budget, pruner.gate)


def views(result: Any) -> list[Any]:
    """What was written, how it compares, and what is lost."""
    kept = f"{result.keep_ratio:.1%} for every prompt"
    rows = {
        "written": f"{result.folder} ({', '.join(result.files[:4])}{', …' if len(result.files) > 4 else ''})",
        "heads kept": f"{kept}, by plan {result.plan} over {result.prompts} prompts",
        "parameters": f"{result.parameters:,} of {result.dense_parameters:,}",
        "weights": f"{result.bytes / 2**20:,.1f} of {result.dense_bytes / 2**20:,.1f} MiB",
        "read back": "not compared" if result.difference is None else f"largest difference {result.difference:.3g}",
        "accuracy": "of the frozen model, below" if result.accuracy else NOT_MEASURED,
        "lost": "\n".join(result.lost),
    }
    return [facts(rows), *([accuracy_table(result.accuracy)] if result.accuracy else [])]


def accuracy_table(accuracy: Any) -> Table:
    """Dense, adaptive and frozen side by side, and the paired difference of the frozen model to the dense one."""
    names = ("dense", "adaptive", "frozen")
    pair = [100 * value for value in (accuracy.paired.diff, *accuracy.paired.ci95)]
    table = Table(
        "",
        *names,
        title=f"{accuracy.dataset}, {accuracy.dense.prompts} problems",
        caption=f"frozen minus dense: {pair[0]:+.1f} points, 95 % interval {pair[1]:+.1f} to {pair[2]:+.1f}",
    )
    table.add_row("accuracy", *(f"{getattr(accuracy, name).accuracy:.1%}" for name in names))
    table.add_row("sparsity", *(f"{getattr(accuracy, name).sparsity:.1%}" for name in names))
    return table
