"""`microglia export`: one keep plan frozen into a smaller model for other runtimes."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.show import facts, share, side_by_side
from microglia.cli.verb import Outcome, progress, verb
from microglia.errors import ConfigError

NOT_MEASURED = "not measured, and not the checkpoint's; say --evaluate N to compare on N test problems"
TASK = Fields(without=("shots", "question_field", "answer_field"), defaults={"dataset": "what it was trained on"})


@verb()
def export(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder that `train` wrote, or a hub id.")] = None,
    *,
    format: Annotated[Literal["hf", "onnx", "gguf"], "Format of the files."] = "hf",
    plan: Annotated[
        Literal["mean", "task", "prompt", "codebook"],
        "Keep what is kept on average, for a task or prompt, or by a codebook's mask.",
    ] = "mean",
    output_dir: Annotated[Path, "An empty or a new folder."] = Path("exported"),
    prompt: Annotated[str | None, "The question of --plan prompt."] = None,
    mask: Annotated[int | None, typer.Option(min=0, help="Which mask of --plan codebook, from 0.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts of --plan task.")] = 64,
    keep_ratio: o.KeepRatio = None,
    evaluate: Annotated[int, typer.Option(min=0, help="Test examples on which to compare with the dense model.")] = 0,
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

    for mask in 0 1 2 3; do microglia export checkpoints --plan codebook --mask $mask --output-dir exported-$mask; done
    """
    from microglia.export import accuracy_kept
    from microglia.export import export as write
    from microglia.export.run import check_folder
    from microglia.tasks import get_task

    if (prompt is not None) != (plan == "prompt"):
        given = "no" if prompt is None else "a"
        raise ConfigError(f"plan={plan!r} was given {given} prompt; --prompt goes with --plan prompt")
    if (mask is not None) != (plan == "codebook"):
        given = "no" if mask is None else "a"
        raise ConfigError(f"plan={plan!r} was given {given} mask; --mask goes with --plan codebook")
    check_folder(output_dir)
    dtype = loading.dtype or ("float32" if format == "onnx" else "auto")
    system = loading.system(checkpoint or model_path, dtype=dtype)
    task = get_task(task_options.dataset or system.training.get("dataset", "arithmetic"))
    draw = partial(task.load, seed=seed, data_dir=task_options.data_dir)
    drawn = [example.question for example in draw("validation", limit=limit)] if plan == "task" else [prompt or ""]
    chosen = keep_plan(system, plan, drawn, keep_ratio, mask)
    accuracy = None
    if evaluate:
        examples = draw("test", limit=evaluate)
        setup = generation.setup(system.model, system.tokenizer, task, examples)
        with progress("evaluating") as update:
            accuracy = accuracy_kept(setup, chosen, system.pruner, update)
    about = {"base_model": system.source, "template": system.template, "accuracy": accuracy}
    how = {"format": format, "check": check, "details": about, "recovery": system.pruner.recovery}
    exported = write(system.model, system.tokenizer, chosen, output_dir, **how)
    result = exported.result(chosen, **about)
    return Outcome(result.to_json(), views(result))


def keep_plan(system: Any, kind: str, questions: list[str], ratio: float | None, mask: int | None = None) -> Any:
    """The plan of this kind for a system, at another keep ratio if one is given."""
    from microglia.export import KeepPlan
    from microglia.reading import read_prompts
    from microglia.tasks.prompts import render_prompt
    from microglia.units import find_sites

    if system.pruner.units != ("head",):
        raise ConfigError(f"this checkpoint prunes {', '.join(system.pruner.units)}, and exports cut heads only")
    if system.pruner.fill != "zero":
        raise ConfigError(
            "this checkpoint fills pruned heads with their mean over each prompt, which cannot be frozen; train with "
            "--fill zero"
        )
    if ratio is not None:
        system.set_keep_ratio(ratio, questions if kind == "task" else None)
    pruner = system.pruner
    if kind == "mean":
        return KeepPlan.of_prompts(kind, pruner)
    if kind == "codebook":
        return KeepPlan.of_mask(pruner, mask)
    prompts = [render_prompt(system.tokenizer, question, system.template) for question in questions]
    logits = read_prompts(system.model, system.tokenizer, prompts, pruner).logits
    pruner = pruner.with_budget(logits, [site.geometry for site in find_sites(system.model)])
    return KeepPlan.of_prompt(pruner) if kind == "prompt" else KeepPlan.of_prompts(kind, pruner)


def views(result: Any) -> list[Any]:
    """What was written, how it compares, and what is lost."""
    kept = share(result.keep_ratio)
    rows = {
        "written": f"{result.folder} ({', '.join(result.files[:4])}{', …' if len(result.files) > 4 else ''})",
        "heads kept": f"{kept} for every prompt, by plan {result.plan} over {result.prompts} prompts",
        "parameters": f"{result.parameters:,} of {result.dense_parameters:,}",
        "weights": f"{result.bytes / 2**20:,.1f} of {result.dense_bytes / 2**20:,.1f} MiB",
        "read back": "not compared" if result.difference is None else f"largest difference {result.difference:.3g}",
        "accuracy": "of the frozen model, below" if result.accuracy else NOT_MEASURED,
        "lost": "\n".join(result.lost),
    }
    parts: list[Any] = [facts(rows)]
    if accuracy := result.accuracy:
        runs = {name: getattr(accuracy, name) for name in ("dense", "adaptive", "frozen")}
        title = f"{accuracy.dataset}, {accuracy.dense.prompts} problems"
        parts += side_by_side(runs, "frozen minus dense", accuracy.paired, title)
    return parts
