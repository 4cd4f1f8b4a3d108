"""`microglia train`: train agents on a task and write a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli import options as o
from microglia.cli.verb import Interrupted, Outcome, facts, verb

Number = typer.Option
METHOD, RUN = "Method", "Run"


@verb
def train(
    *,
    model: o.Model = "reasoner",
    output_dir: Annotated[Path, Number("--output-dir", help="Folder for the checkpoint.")] = Path("checkpoints"),
    dataset: o.Dataset = "arithmetic",
    data_dir: o.DataDir = None,
    shots: o.Shots = 0,
    question_field: o.QuestionField = None,
    answer_field: o.AnswerField = None,
    num_epochs: Annotated[float | None, Number(help="Passes over the examples.", show_default="3.0")] = None,
    max_steps: Annotated[int | None, Number(help="Steps instead of epochs.", show_default="-1")] = None,
    limit: Annotated[int | None, Number(help="Training examples.", show_default="all")] = None,
    batch_size: Annotated[int | None, Number(show_default="16")] = None,
    learning_rate: Annotated[float | None, Number(show_default="0.003")] = None,
    warmup_steps: Annotated[int | None, Number(help="Until the full learning rate.", show_default="20")] = None,
    alpha_min: Annotated[float | None, Number(help="Weight of mean(keep) at first.", show_default="0.01")] = None,
    alpha_max: Annotated[float | None, Number(help="Weight of mean(keep) at last.", show_default="0.3")] = None,
    schedule: Annotated[str | None, Number(help="linear, cosine, exponential.", show_default="linear")] = None,
    beta: Annotated[float | None, Number(help="Weight of the gates' entropy.", show_default="0.01")] = None,
    keep_ratio: Annotated[float | None, Number(help="Steer to this keep ratio; alpha is not used.")] = None,
    ramp: Annotated[
        float | None, Number(help="Share of the steps in which it comes down from 1.", show_default="0.5")
    ] = None,
    estimator: Annotated[
        str | None,
        Number(
            "--estimator",
            "--gate",
            help="straight-through or soft.",
            show_default="straight-through",
            rich_help_panel=METHOD,
        ),
    ] = None,
    temperature: Annotated[
        float | None, Number(help="Of the gates' sigmoid.", show_default="1.0", rich_help_panel=METHOD)
    ] = None,
    noise: Annotated[
        float | None, Number(help="On the gates at first; 0 at last.", show_default="1.0", rich_help_panel=METHOD)
    ] = None,
    distill: Annotated[
        float | None, Number(help="Weight of the dense model's answers.", show_default="0.0", rich_help_panel=METHOD)
    ] = None,
    fill: Annotated[
        str | None, Number(help="Behind pruned heads: zero or mean.", show_default="zero", rich_help_panel=METHOD)
    ] = None,
    lora: Annotated[
        str | None, Number(help="none, first or joint.", show_default="none", rich_help_panel=METHOD)
    ] = None,
    lora_rank: Annotated[int | None, Number(show_default="8", rich_help_panel=METHOD)] = None,
    lora_steps: Annotated[int | None, Number(show_default="100", rich_help_panel=METHOD)] = None,
    lora_learning_rate: Annotated[
        float | None, Number(help="Of the adapters.", show_default="0.0003", rich_help_panel=METHOD)
    ] = None,
    policy: Annotated[
        str, Number(help="agents: an MLP per site; mixture: of learned masks.", rich_help_panel=METHOD)
    ] = "agents",
    hidden_dim: Annotated[
        int | None,
        Number(min=1, help="Of an MLP; masks of a mixture.", show_default="128, 16", rich_help_panel=METHOD),
    ] = None,
    features: Annotated[str, Number(help="both, norm or entropy.", rich_help_panel=METHOD)] = "both",
    norm: Annotated[str, Number(help="head, or hidden as the original.", rich_help_panel=METHOD)] = "head",
    window: Annotated[int, Number(help="Prompt tokens for entropy, 0: all.", rich_help_panel=METHOD)] = 64,
    bucket: Annotated[
        int | None, Number(help="Counts are multiples of it.", show_default="heads / 8", rich_help_panel=METHOD)
    ] = None,
    num_heads: Annotated[int | None, Number(help="Checked against the model.", rich_help_panel=METHOD)] = None,
    seed: o.Seed = 0,
    patience: Annotated[
        int | None, Number(help="Stop early after so many evaluations.", show_default="0", rich_help_panel=RUN)
    ] = None,
    eval_steps: Annotated[int | None, Number(show_default="100", rich_help_panel=RUN)] = None,
    eval_limit: Annotated[
        int | None, Number(help="Validation examples.", show_default="128", rich_help_panel=RUN)
    ] = None,
    save_steps: Annotated[
        int | None, Number(help="How often --resume can go on.", show_default="100", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[bool, Number("--resume", help="Go on with an interrupted run.", rich_help_panel=RUN)] = False,
    report_to: Annotated[
        str | None, Number(help="tensorboard, wandb, trackio.", show_default="none", rich_help_panel=RUN)
    ] = None,
    bf16: Annotated[bool, Number("--bf16", rich_help_panel=RUN)] = False,
    gradient_checkpointing: Annotated[bool, Number("--gradient-checkpointing", rich_help_panel=RUN)] = False,
    shard: Annotated[
        bool,
        Number("--shard", help="Divide the base model among the processes of torchrun (FSDP2).", rich_help_panel=RUN),
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> Outcome:
    """Train agents that decide which heads a prompt needs.

    microglia train --output-dir checkpoints

    microglia train --model Qwen/Qwen2.5-3B-Instruct --dataset gsm8k --num-epochs 1 --keep-ratio 0.75
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from microglia.look import Look
    from microglia.results import TrainingRun
    from microglia.system import MicrogliaPruningSystem
    from microglia.training import TrainingConfig

    config = TrainingConfig()
    chosen = {name: given[name] for name in vars(config) if name in given}
    chosen["alpha"] = (given.get("alpha_min", config.alpha[0]), given.get("alpha_max", config.alpha[1]))
    chosen |= {"temperature": (temperature, temperature)} if temperature is not None else {}
    chosen |= {"noise": (noise, 0.0)} if noise is not None else {}
    task = o.task(dataset, shots, question_field, answer_field)
    system = MicrogliaPruningSystem(
        model or "reasoner",
        num_heads,
        hidden_dim,
        policy=policy,
        features=features,
        look=Look(norm=norm, window=window or None),
        bucket=bucket,
        seed=seed,
        **o.loading("cpu" if shard else device, dtype, trust_remote_code),
    )
    alpha = chosen.pop("alpha")
    try:
        result = system.train(
            task, num_epochs, alpha, output_dir=output_dir, data_dir=data_dir, resume=resume, **chosen
        )
    except KeyboardInterrupt:
        raise Interrupted(kept(output_dir)) from None
    saved = system.checkpoint().config
    parameters = sum(p.numel() for p in result.policy.parameters())
    run = TrainingRun(
        output_dir=str(output_dir),
        base_model=saved.base_model,
        dataset=dataset,
        seconds=result.seconds,
        agent_parameters=parameters,
        agent_share=parameters / saved.base_parameters,
        training=dict(saved.training),
    )
    last = saved.training["last"]
    rows = {
        "checkpoint": output_dir,
        "keep ratio, task loss": ", ".join(f"{last[name]:.3f}" for name in ("keep_ratio", "task") if name in last),
        "agents": f"{parameters:,} parameters, {run.agent_share:.2%} of the model",
        "time": f"{result.seconds:.0f} s",
        "next": f"microglia evaluate --model-path {output_dir} --dataset {dataset}",
    }
    return Outcome(run.to_json(), [facts(rows)])


def kept(output_dir: Path) -> str:
    """What an interrupted run left, and how to go on."""
    steps = [int(path.name.rpartition("-")[2]) for path in output_dir.glob("agents/checkpoint-*") if path.is_dir()]
    first = [path for path in output_dir.glob("lora/checkpoint-*") if path.is_dir()]
    if not steps and not first:
        return (
            f"interrupted before the first save, so {output_dir} keeps no step; start again, with smaller --save-steps"
        )
    what = f"agents up to step {max(steps)}" if steps else "a part of the LoRA stage"
    return f"interrupted; {output_dir} keeps the {what}: go on with the same command and --resume"
