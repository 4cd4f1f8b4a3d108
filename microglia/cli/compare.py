"""`microglia compare`: agents, their static twin and criteria on one bench, over keep ratios and seeds."""

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
from microglia.cli.verb import GO_ON, Outcome, finite, progress, verb
from microglia.errors import ConfigError

CELLS, RECORDS, SUMMARY, PAIRS = "cells.jsonl", "records.jsonl", "comparison.json", "pairs"
DIAL_PROMPTS = 200  # held-out prompts on which each keep ratio becomes a threshold


@verb()
def compare(
    *,
    model_path: Annotated[o.Many, "Checkpoint with agents; one, or one per seed."] = None,
    train_pairs: Annotated[
        bool,
        typer.Option(
            "--train-pairs", help="Instead train agents and static baseline anew for each seed, as the demo does."
        ),
    ] = False,
    policies: Annotated[o.Many, "Criteria (norm,taylor:per-input) or name=FOLDER.", "random"] = None,
    keep_ratios: Annotated[
        o.Many,
        typer.Option("--keep-ratios", "--keep-ratio", help="One or several.", show_default="0.9,0.8,0.7,0.6,0.5"),
    ] = None,
    at_keep_ratio: Annotated[float | None, "Keep ratio at which adaptivity is judged.", "what the agents keep"] = None,
    seeds: Annotated[o.Many, "Seeds of the policies: 0,1,2.", "0"] = None,
    num_runs: Annotated[int, typer.Option(min=0, help="Repetitions of the timing; 0: no timing.")] = 20,
    output_dir: Annotated[Path | None, "Folder for records, and to go on from after an interruption.", "none"] = None,
    plot: Annotated[Path | None, "Picture to write: .png, .svg or .pdf."] = None,
    answer_limit: o.AnswerLimit = None,
    examples: o.Examples,
    generation: o.Generation,
    loading: o.Unquantised,
) -> Outcome:
    """Compare agents with their static baseline and with criteria on the same prompts.

    microglia compare --model-path checkpoints --policies random,norm,taylor --limit 500 --output-dir results/compare
    """
    from microglia.checkpoint import check_writable
    from microglia.compare import at_keep_ratio as choose
    from microglia.compare import compare as measure
    from microglia.compare import contenders, draw, summarise
    from microglia.compare.plot import check_plot
    from microglia.ledger import Ledger
    from microglia.record import append_records, circumstances

    if plot is not None:
        check_plot(plot)
    if output_dir is not None:
        check_writable(output_dir)
    ratios = numbers("--keep-ratios", keep_ratios, float) or [0.9, 0.8, 0.7, 0.6, 0.5]
    all_seeds = numbers("--seeds", seeds, int) or [0]
    twins = list[Any]()
    system, own = fresh(model_path, loading, output_dir) if train_pairs else load(model_path, loading)
    arena, training_examples = arena_of(system, examples, generation, answer_limit, num_runs)
    if train_pairs:
        own, twins = pairs(arena.dial, all_seeds, Path(str(output_dir)), system.source, examples.data_dir)
    found = contenders(
        policies or ["random"],
        arena.bench,
        own,
        training_examples,
        bucket=system.gate.bucket,
        trained=system.training.get("config"),
        twins=twins,
    )
    at = choose(arena, own[0], ratios, at_keep_ratio)
    about = {**vars(examples), "path": generation.how()["path"], "fill": system.fill, "scope": system.scope}
    about |= {"look": asdict(system.look), "max_new_tokens": generation.max_new_tokens, "answer_room": answer_limit}
    about |= {"base_model": system.source, "bucket": system.gate.bucket}
    place = None if output_dir is None else output_dir / CELLS
    ledger = Ledger(place, {**about, "data_dir": None if examples.data_dir is None else str(examples.data_dir)})
    del about["data_dir"]
    stopped = (
        "nothing was kept, as --output-dir was not given"
        if place is None
        else f"{place} keeps the finished cells: {GO_ON}"
    )
    with progress("comparing", stopped) as update:
        cells = measure(arena, found, [*ratios, at], all_seeds, ledger=ledger, progress=update)
    around = circumstances(next(system.model.parameters()).device)
    data = finite({**summarise(cells, at), **about, **around})
    if output_dir is not None:
        (output_dir / RECORDS).unlink(missing_ok=True)  # they are of this comparison, as the summary is
        append_records(output_dir / RECORDS, records(data, around, examples.seed))
        (output_dir / SUMMARY).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        draw(data, plot, title=f"{Path(str(system.source)).name}, {examples.dataset}")
    return Outcome(data, views(data))


def load(folders: o.Many, loading: o.Loading) -> tuple[Any, list[Any]]:
    """The system of the first checkpoint, and the agents of all of them."""
    from microglia.checkpoint import Checkpoint

    names = [name for text in folders or () for name in text.split(",") if name]
    system = loading.system(names[0] if names else None)
    checkpoints = [Checkpoint.from_pretrained(name) for name in names]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        checkpoint.check(system.model)
        if checkpoint.config.policy == "static":
            raise ConfigError(f"{name} holds a static mask; give agents, and the mask as --policies gate={name}")
        if checkpoint.config.lora and len(names) > 1:
            raise ConfigError(f"{name} brings a LoRA adapter, so it is another model; compare it in a run of its own")
    device = next(system.model.parameters()).device
    return system, [system.policy, *(checkpoint.policy.to(device).eval() for checkpoint in checkpoints[1:])]


def fresh(folders: o.Many, loading: o.Loading, output_dir: Path | None) -> tuple[Any, list[Any]]:
    """A system whose agents are still to be trained. Raises ConfigError for options that exclude each other."""
    from microglia.system import MicrogliaPruningSystem

    if folders or output_dir is None:
        raise ConfigError(
            "--train-pairs trains agents instead of loading them and keeps them in a folder; leave --model-path out "
            "and give --output-dir"
        )
    return MicrogliaPruningSystem(loading.model or "reasoner", **loading.arguments()), []


def pairs(
    dial: Any, seeds: list[int], output_dir: Path, source: str | None, data_dir: Path | None
) -> tuple[list[Any], list[Any]]:
    """Agents and twins of all seeds, trained by the demo's recipe or taken from an earlier run."""
    from microglia.demo import RECIPE
    from microglia.pair import trained_pair

    made = []
    most = max(RECIPE.first.max_steps, RECIPE.second.max_steps, 1)
    for seed in seeds:
        with progress(f"training, seed {seed}", f"{output_dir / PAIRS} keeps the finished pairs: {GO_ON}") as update:
            on_log = partial(_steps, update, most)
            place = output_dir / PAIRS / str(seed)
            made.append(trained_pair(dial, RECIPE, seed, place, base_model=source, data_dir=data_dir, on_log=on_log))
    return [pair.agents for pair in made], [pair.twin for pair in made]


def _steps(update: Any, most: int, row: dict[str, Any]) -> None:
    update("steps", row["step"], most)


def arena_of(
    system: Any, examples: o.Examples, generation: o.Generation, answer_limit: float | None, num_runs: int
) -> tuple[Any, Any]:
    """The bench and its dial, and a function that draws training examples for criteria."""
    from microglia.compare import Arena
    from microglia.evaluation.bench import Bench

    bench = Bench(
        system.model,
        system.tokenizer,
        examples.task(),
        examples.load(),
        system.look,
        system.fill,
        system.scope,
        answer_room=answer_limit,
        **generation.how(),
    )
    held_out = "validation" if examples.split != "validation" else "train"
    dial = replace(bench, examples=examples.load(split=held_out, limit=DIAL_PROMPTS), answer_room=None)

    def training_examples(count: int | None, seed: int) -> Any:
        return examples.load(split="train", limit=count, seed=seed)

    return Arena(bench, dial, replace(system.gate, threshold=0.0), num_runs=num_runs), training_examples


def records(data: dict[str, Any], around: dict[str, Any], seed: int) -> list[Any]:
    """One record per row, and one for what adaptivity adds."""
    from microglia.record import Record

    about = {name: data[name] for name in ("dataset", "split", "path", "base_model", "max_new_tokens", "answer_room")}
    rows = [
        Record("accuracy", row["accuracy"], "ratio", n=row["prompts"], seed=seed, extra={**about, **row}, **around)
        for row in data["rows"]
    ]
    gain = data["adaptivity"]
    n = data["rows"][0]["prompts"]
    return [*rows, Record("adaptivity", gain["gain"], "ratio", n=n, seed=seed, extra={**about, **gain}, **around)]


def views(data: dict[str, Any]) -> list[Any]:
    """The table, and what it shows in sentences."""
    first = data["rows"][0]
    table = Table(
        title=f"{data['dataset']}, {data['split']}, {first['prompts']} prompts",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    timed = first["ms_per_token"] is not None
    table.add_column("", no_wrap=True)
    for name in ("kept", "right, 95 %", "loss", "tokens", *(("ms", "faster", "KV KiB") * timed), "p", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in data["rows"]:
        time = []
        if timed:
            time = [f"{row['ms_per_token']:.2f}", f"{row['ratio_to_dense']:.2f}×", f"{row['kv_bytes'] / 1024:,.0f}"]
        low, high = row["ci95"]
        table.add_row(
            row["policy"],
            f"{row['keep_ratio']:.1%}",
            f"{100 * row['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})",
            f"{row['loss']:.3f}",
            f"{row['mean_tokens']:.0f}",
            *time,
            f"{row['agents_p_holm']:.2g}" if "agents_p_holm" in row else "",
            "*" if row.get("pareto_latency", row["pareto_sparsity"]) else "",
        )
    return [table, *sentences(data)]


def sentences(data: dict[str, Any]) -> list[str]:
    """What adaptivity adds, and whether sparsity follows difficulty and family."""
    gain, (low, high) = data["adaptivity"]["gain"], data["adaptivity"]["ci95"]
    kept = data["adaptivity"]["keep_ratios"]
    found = "supports" if low is not None and low > 0 else "does not support"
    ends = "" if low is None else f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    lines = [
        "p: against the agents at the same target, Holm-corrected. *: no other row is both as accurate and as "
        + ("small." if data["rows"][0]["ms_per_token"] is None else "fast. ms: of a step; faster: dense time ÷ this."),
        f"Adapting to the input adds {100 * gain:+.1f} points{ends}, at {kept['agents']:.1%} of the heads against "
        f"{kept['gate']:.1%} of the static twin's: this run {found} a gain.",
    ]
    follows = data["follows_difficulty"]
    if follows["rank_correlation"] is None:
        lines.append("The agents prune every prompt alike, so sparsity follows nothing.")
    else:
        rho, (low, high) = follows["rank_correlation"], follows["ci95"]
        lines.append(f"Rank correlation of steps and sparsity: {rho:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}.")
    families = {name: value for name, value in data["sparsity_by_family"].items() if name}
    if families:
        lines.append("Heads pruned by family: " + ", ".join(f"{name} {value:.1%}" for name, value in families.items()))
    return lines
