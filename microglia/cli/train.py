"""`microglia train`: train agents on a task and write a checkpoint."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.settings import write_settings
from microglia.cli.show import facts
from microglia.cli.verb import Interrupted, Outcome, verb
from microglia.errors import ConfigError
from microglia.training.config import TrainingConfig

SETTINGS = "train.yaml"
SHOWN = (
    *("model", "dataset", "data_dir", "output_dir", "policy", "units", "target", "recovery", "keep_ratio", "bytes"),
    *("max_steps", "limit", "batch_size", "learning_rate", "resume"),
)
ONCE = {"alpha_min", "alpha_max", "scope", "norm", "resume"}  # what no file of settings repeats
Training = Annotated[TrainingConfig, Fields(names={"epochs": "num_epochs", "byte_share": "bytes"}, panel="Training")]
Old = typer.Option(hidden=True)


@verb(shown=SHOWN)
def train(
    *,
    loading: o.Unquantised = o.Loading(model="reasoner"),
    task: o.TaskOptions,
    output_dir: Annotated[Path, "Folder for the checkpoint."] = Path("checkpoints"),
    resume: Annotated[bool, "Go on with an interrupted run."] = False,
    training: Training,
    pruner: o.PrunerOptions,
    num_heads: Annotated[int | None, "Heads of a layer, checked against the model."] = None,
    alpha_min: Annotated[float | None, Old] = None,
    alpha_max: Annotated[float | None, Old] = None,
    scope: Annotated[str | None, Old] = None,
    norm: Annotated[str | None, Old] = None,
    settings: dict[str, Any],
) -> Outcome:
    """Train agents that decide which heads a prompt needs.

    microglia train --output-dir checkpoints

    microglia train --model smollm2 --dataset prompts --keep-ratio 0.8 --recovery 16
    """
    from microglia import processes
    from microglia.results import TrainingRun
    from microglia.system import MicrogliaPruningSystem

    for name, value in {"scope": scope, "norm": norm}.items():
        if value is not None:
            raise ConfigError(f"--{name} was dropped, 0.1.0 is the last version with it; leave it out")
    start, end = training.alpha
    alpha = (start if alpha_min is None else alpha_min, end if alpha_max is None else alpha_max)
    training = replace(training, alpha=alpha)
    system = MicrogliaPruningSystem(
        loading.model or "reasoner",
        num_heads,
        **pruner.parts(),
        seed=training.seed,
        **(replace(loading, device="cpu") if training.shard else loading).arguments(),
    )
    complete = {name: value for name, value in settings.items() if name not in ONCE}
    complete["alpha"] = f"{alpha[0]},{alpha[1]}"

    @cache
    def keep_settings() -> None:
        if processes.is_first():
            write_settings(output_dir / SETTINGS, "train", complete)

    try:
        result = system.train(
            task.task(),
            output_dir=output_dir,
            data_dir=task.data_dir,
            resume=resume,
            on_log=lambda _: keep_settings(),  # at the first step: a folder that holds another run was refused before
            **vars(training),
        )
        keep_settings()
    except KeyboardInterrupt:
        if output_dir.is_dir() and not (output_dir / SETTINGS).exists():  # it came before the first line of the log
            keep_settings()
        raise Interrupted(kept(output_dir)) from None
    saved = system.checkpoint().config
    parameters = sum(p.numel() for p in result.pruner.policy.parameters())
    run = TrainingRun(
        output_dir=str(output_dir),
        base_model=saved.base_model,
        dataset=task.dataset,
        seconds=result.seconds,
        agent_parameters=parameters,
        agent_share=parameters / saved.base_parameters,
        training=dict(saved.training),
    )
    last = saved.training["last"]
    shown = {"keep_ratio": "keep ratio", "byte_share": "bytes", "task": "task loss"}
    named = {label: f"{last[name]:.3f}" for name, label in shown.items() if name in last}
    rows = {
        "checkpoint": output_dir,
        ", ".join(named): ", ".join(named.values()),
        "agents": f"{parameters:,} parameters, {run.agent_share:.2%} of the model",
        "time": f"{result.seconds:.0f} s",
        "next": f"microglia evaluate --model-path {output_dir} --dataset {task.dataset}",
    }
    return Outcome(run.to_json(), [facts(rows)])


def kept(output_dir: Path) -> str:
    """What an interrupted run left, and how to go on."""
    steps = [int(path.name.rpartition("-")[2]) for path in output_dir.glob("agents/checkpoint-*") if path.is_dir()]
    first = [path for path in output_dir.glob("lora/checkpoint-*") if path.is_dir()]
    if not steps and not first:
        return f"interrupted before the first save: {output_dir} keeps no step; start again, with smaller --save-steps"
    what = f"agents up to step {max(steps)}" if steps else "a part of the LoRA stage"
    return f"interrupted; {output_dir} keeps the {what}: go on with the same command and --resume"
