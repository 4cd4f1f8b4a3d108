"""`microglia compare`: agents, their static baseline and criteria on the same prompts, over keep ratios and seeds."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.numbers import numbers
from microglia.cli.verb import Interrupted, Outcome, progress, verb
from microglia.errors import ConfigError

LEDGER, RECORDS, SUMMARY, PAIRS = "ledger.jsonl", "records.jsonl", "comparison.json", "pairs"
HELD_OUT = 200  # held-out prompts on which each keep ratio becomes a threshold
Many = list[str] | None


@verb
def compare(
    *,
    model_path: Annotated[
        Many, typer.Option("--model-path", "--checkpoint", help="Checkpoint with agents; one, or one per seed.")
    ] = None,
    train_pairs: Annotated[
        bool,
        typer.Option("--train-pairs", help="Train agents and static baseline for each seed instead."),
    ] = False,
    policies: Annotated[
        Many,
        typer.Option("--policies", help="Criteria (norm,taylor:per-input) or name=FOLDER.", show_default="random"),
    ] = None,
    keep_ratios: Annotated[
        Many, typer.Option("--keep-ratios", "--keep-ratio", help="One or several.", show_default="0.9,0.8,0.7,0.6,0.5")
    ] = None,
    at_keep_ratio: Annotated[
        float | None,
        typer.Option("--at-keep-ratio", help="Where adaptivity is judged.", show_default="what the agents keep"),
    ] = None,
    seeds: Annotated[Many, typer.Option("--seeds", help="Of the policies: 0,1,2.", show_default="0")] = None,
    dataset: o.Dataset = "arithmetic",
    data_dir: o.DataDir = None,
    shots: o.Shots = 0,
    question_field: o.QuestionField = None,
    answer_field: o.AnswerField = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Prompts.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: o.MaxNewTokens = 256,
    answer_room: o.AnswerRoom = None,
    path: o.PrunedPath = "compact",
    num_runs: Annotated[int, typer.Option("--num-runs", min=0, help="Repetitions of the timing; 0: no timing.")] = 20,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Folder for runs (to go on after an interruption) and records.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture to write: .png, .svg or .pdf.")] = None,
    model: o.Model = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> Outcome:
    """Compare agents with their static baseline and with criteria on the same prompts.

    microglia compare --model-path checkpoints --policies random,norm,taylor --limit 500 --output-dir results/compare
    """
    from microglia.checkpoint import check_writable
    from microglia.experiments.compare import BASELINE, draw, make_entries, summarise
    from microglia.experiments.compare import at_keep_ratio as choose
    from microglia.experiments.compare import compare as measure
    from microglia.experiments.compare.plot import check_plot
    from microglia.experiments.ledger import Ledger
    from microglia.record import append_records, circumstances
    from microglia.results import Circumstances

    if plot is not None:
        check_plot(plot)
    if output_dir is not None:
        check_writable(output_dir)
    ratios = numbers("--keep-ratios", keep_ratios, float) or [0.9, 0.8, 0.7, 0.6, 0.5]
    all_seeds = numbers("--seeds", seeds, int) or [0]
    how, baselines = o.loading(device, dtype, trust_remote_code), list[Any]()
    system, agents = fresh(model_path, model, output_dir, how) if train_pairs else load(model_path, model, how)
    task = o.task(dataset, shots, question_field, answer_field)
    comparison, examples = prepared(system, task, data_dir, split, limit, seed, path, batch_size, max_new_tokens)
    comparison = replace(comparison, setup=replace(comparison.setup, answer_room=answer_room), num_runs=num_runs)
    if train_pairs:
        agents, baselines = pairs(comparison.held_out, all_seeds, Path(str(output_dir)), system.source, data_dir)
    compared = make_entries(
        policies or ["random"],
        comparison.setup,
        examples,
        {"agents": agents, BASELINE: baselines},
        bucket=system.gate.bucket,
        training=system.training.get("config"),
    )
    at = choose(comparison, agents[0], ratios, at_keep_ratio)
    settings = {"limit": limit, "seed": seed, "path": path, "fill": system.fill, "scope": system.scope}
    settings |= {"look": asdict(system.look), "max_new_tokens": max_new_tokens, "answer_room": answer_room}
    settings |= {"base_model": system.source, "bucket": system.gate.bucket, "shots": shots}
    settings |= {"question_field": question_field, "answer_field": answer_field}
    depends = {"dataset": dataset, "split": split, "data_dir": None if data_dir is None else str(data_dir), **settings}
    ledger = Ledger(None if output_dir is None else output_dir / LEDGER, depends)
    try:
        with progress("comparing") as update:
            comparison = replace(comparison, ledger=ledger, progress=update)
            runs = measure(comparison, compared, [*ratios, at], all_seeds)
    except KeyboardInterrupt:
        if output_dir is None:
            raise Interrupted("interrupted; nothing was kept, as --output-dir was not given") from None
        raise Interrupted(
            f"interrupted; {output_dir / LEDGER} keeps the finished runs: go on with the same command"
        ) from None
    made = Circumstances(**circumstances(next(system.model.parameters()).device))
    result = summarise(runs, at)
    result = replace(result, dataset=dataset, split=split, settings=settings, circumstances=made)
    data = result.to_json()
    if output_dir is not None:
        (output_dir / RECORDS).unlink(missing_ok=True)  # they are of this comparison, as the summary is
        append_records(output_dir / RECORDS, records(result))
        (output_dir / SUMMARY).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        draw(result, plot, title=f"{Path(str(system.source)).name}, {dataset}")
    return Outcome(data, views(result))


def load(folders: Many, model: str | None, how: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The system of the first checkpoint, and the agents of all of them."""
    from microglia.checkpoint import Checkpoint

    names = [name for text in folders or () for name in text.split(",") if name]
    system = o.load(names[0] if names else None, model, **how)
    checkpoints = [Checkpoint.from_pretrained(name) for name in names]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        checkpoint.check(system.model)
        if checkpoint.config.policy == "static":
            raise ConfigError(
                f"{name} holds a static mask; give agents, and the mask as --policies static_baseline={name}"
            )
        if checkpoint.config.lora and len(names) > 1:
            raise ConfigError(f"{name} brings a LoRA adapter, so it is another model; compare it in a run of its own")
    device = next(system.model.parameters()).device
    return system, [system.policy, *(checkpoint.policy.to(device).eval() for checkpoint in checkpoints[1:])]


def fresh(folders: Many, model: str | None, output_dir: Path | None, how: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A system whose agents are still to be trained. Raises ConfigError for options that exclude each other."""
    from microglia.system import MicrogliaPruningSystem

    if folders or output_dir is None:
        raise ConfigError(
            "--train-pairs trains agents instead of loading them and keeps them in a folder; leave --model-path out "
            "and give --output-dir"
        )
    return MicrogliaPruningSystem(model or "reasoner", **how), []


def pairs(
    held_out: Any, seeds: list[int], output_dir: Path, source: str | None, data_dir: Path | None
) -> tuple[list[Any], list[Any]]:
    """Agents and static baselines of all seeds, trained by the demo's recipe or taken from an earlier run."""
    from microglia.experiments.demo import RECIPE
    from microglia.experiments.side_by_side import saved_pair

    made = []
    most = max(RECIPE.first.max_steps, RECIPE.second.max_steps, 1)
    try:
        for seed in seeds:
            with progress(f"training, seed {seed}") as update:
                made.append(
                    saved_pair(
                        held_out,
                        RECIPE,
                        seed,
                        output_dir / PAIRS / str(seed),
                        base_model=source,
                        data_dir=data_dir,
                        on_log=partial(_steps, update, most),
                    )
                )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {output_dir / PAIRS} keeps the finished pairs: go on with the same command"
        ) from None
    return [pair.agents for pair in made], [pair.static_baseline for pair in made]


def _steps(update: Any, most: int, row: dict[str, Any]) -> None:
    update("steps", row["step"], most)


def prepared(
    system: Any,
    task: Any,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    path: str,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[Any, Any]:
    """What is compared on, and a function that draws training examples for criteria."""
    from microglia.evaluation.bench import Bench
    from microglia.experiments.compare import Comparison

    setup = Bench(
        system.model,
        system.tokenizer,
        task,
        task.load(split, limit=limit, seed=seed, data_dir=data_dir),
        system.look,
        system.fill,
        system.scope,
        path,
        batch_size,
        max_new_tokens,
    )
    other = "validation" if split != "validation" else "train"
    held_out = replace(setup, examples=task.load(other, limit=HELD_OUT, seed=seed, data_dir=data_dir))

    def examples(count: int | None, at: int) -> Any:
        return task.load("train", limit=count, seed=at, data_dir=data_dir)

    return Comparison(setup, held_out, replace(system.gate, threshold=0.0)), examples


def records(result: Any) -> list[Any]:
    """One record per row, and one for what adaptivity adds."""
    from microglia.record import Record
    from microglia.results import plain

    names = ("path", "base_model", "max_new_tokens", "answer_room")
    extra = {"dataset": result.dataset, "split": result.split, **{name: result.settings[name] for name in names}}
    around = {"seed": result.settings["seed"], **asdict(result.circumstances)}
    rows = [
        Record("accuracy", row.accuracy, "ratio", n=row.prompts, extra={**extra, **plain(row)}, **around)
        for row in result.rows
    ]
    n, gain = result.rows[0].prompts, result.adaptivity
    return [*rows, Record("adaptivity", gain.gain, "ratio", n=n, extra={**extra, **plain(gain)}, **around)]


def views(result: Any) -> list[Any]:
    """The table, and what it shows in sentences."""
    first = result.rows[0]
    title = f"{result.dataset}, {result.split}, {first.prompts} prompts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for name in ("kept", "right, 95 %", "loss", "tokens", *(("ms", "faster", "KV KiB") * bool(first.latency)), "p", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        time = []
        if row.latency:
            time = [f"{row.latency.ms_per_token:.2f}", f"{row.latency.ratio_to_dense:.2f}×"]
            time.append(f"{row.latency.kv_bytes / 1024:,.0f}")
        low, high = row.ci95
        best = row.pareto_sparsity if row.pareto_latency is None else row.pareto_latency
        table.add_row(
            row.policy,
            f"{row.keep_ratio:.1%}",
            f"{100 * row.accuracy:.1f} ({100 * low:.0f}–{100 * high:.0f})",
            f"{row.loss:.3f}",
            f"{row.mean_tokens:.0f}",
            *time,
            f"{row.agents_to_this.p_holm:.2g}" if row.agents_to_this else "",
            "*" if best else "",
        )
    return [table, *sentences(result)]


def sentences(result: Any) -> list[str]:
    """What adaptivity adds, and whether sparsity follows difficulty and family."""
    gain, (low, high) = result.adaptivity, result.adaptivity.ci95
    agents, baseline = gain.keep_ratios["agents"], gain.keep_ratios["static_baseline"]
    ends = "" if low != low else f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    lines = [
        "p: against the agents at the same target, Holm-corrected. *: no other row is both as accurate and as "
        + ("fast. ms: of a step; faster: dense time ÷ this." if result.rows[0].latency else "small."),
        f"Adapting to the input adds {100 * gain.gain:+.1f} points{ends}, at {agents:.1%} of the heads against "
        f"{baseline:.1%} of the static baseline's: this run {'supports' if low > 0 else 'does not support'} a gain.",
    ]
    if follows := result.follows_difficulty:
        rho, (low, high) = follows.rank_correlation, follows.ci95
        lines.append(f"Rank correlation of steps and sparsity: {rho:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}.")
    else:
        lines.append("The agents prune every prompt alike, so sparsity follows nothing.")
    families = {name: value for name, value in result.sparsity_by_family.items() if name}
    if families:
        lines.append("Heads pruned by family: " + ", ".join(f"{name} {value:.1%}" for name, value in families.items()))
    return lines
