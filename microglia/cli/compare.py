"""`microglia compare`: agents, their static baseline and criteria on the same prompts, over keep ratios and seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import options as o
from microglia.cli.show import adds, follows, interval, share, table
from microglia.cli.verb import GO_ON, Outcome, progress, verb
from microglia.cli.writing import measured_on, recorder, write_run
from microglia.errors import ConfigError

LEDGER, SUMMARY, PAIRS = "ledger.jsonl", "comparison.json", "pairs"
HELD_OUT = 200  # held-out prompts on which each keep ratio becomes a threshold


@verb()
def compare(
    *,
    model_path: Annotated[o.Many, "Checkpoint with agents; one, or one per seed."] = None,
    train_pairs: Annotated[bool, "Train agents and baseline per seed instead."] = False,
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
    from microglia.experiments.compare import BASELINE, draw, make_entries, summarise
    from microglia.experiments.compare import at_keep_ratio as choose
    from microglia.experiments.compare import compare as measure
    from microglia.experiments.compare.plot import check_plot
    from microglia.ledger import Ledger

    if plot is not None:
        check_plot(plot)
    o.check_output(output_dir)
    ratios = o.numbers("--keep-ratios", keep_ratios, float) or [0.9, 0.8, 0.7, 0.6, 0.5]
    all_seeds = o.numbers("--seeds", seeds, int) or [0]
    system, agents = fresh(model_path, loading, output_dir) if train_pairs else load(model_path, loading)
    comparison, training_examples = prepared(system, examples, generation, answer_limit, num_runs)
    baselines = list[Any]()
    if train_pairs:
        place = Path(str(output_dir))
        agents, baselines = pairs(comparison.held_out, all_seeds, place, system.source, examples.data_dir)
    compared = make_entries(
        policies or ["random"],
        comparison.setup,
        training_examples,
        {"agents": agents, BASELINE: baselines},
        like=comparison.like,
        training=system.training,
    )
    at = choose(comparison, replace(comparison.like, policy=agents[0].policy), ratios, at_keep_ratio)
    where, settings = examples.settings()
    like = comparison.like
    settings |= {"execution": generation.execution, "max_new_tokens": generation.max_new_tokens}
    settings |= {"fill": like.fill, "window": like.window, "bucket": like.gate.bucket}
    settings |= {"answer_limit": answer_limit, "base_model": system.source}
    file = None if output_dir is None else output_dir / LEDGER
    ledger = Ledger(file, {**where, **settings})
    kept = f"{file} keeps the finished runs: {GO_ON}" if file else "nothing was kept, as --output-dir was not given"
    with progress("comparing", kept) as update:
        runs = measure(replace(comparison, ledger=ledger, progress=update), compared, [*ratios, at], all_seeds)
    result = replace(summarise(runs, at), **where, settings=settings, circumstances=measured_on(system.model))
    if output_dir is not None:
        write_run(output_dir / SUMMARY, result, records(result))
    if plot is not None:
        draw(result, plot, title=f"{Path(str(system.source)).name}, {examples.dataset}")
    return Outcome(result.to_json(), views(result))


def load(folders: o.Many, loading: o.Loading) -> tuple[Any, list[Any]]:
    """The system of the first checkpoint, and the pruners of all of them."""
    from microglia.checkpoint import Checkpoint

    names = o.names(folders or ())
    system = loading.system(names[0] if names else None)
    checkpoints = [Checkpoint.from_pretrained(name) for name in names]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        checkpoint.check(system.model)
        if checkpoint.config.policy == "static":
            raise ConfigError(f"{name} holds a static mask; give agents, and it as --policies static_baseline={name}")
        if checkpoint.config.lora and len(names) > 1:
            raise ConfigError(f"{name} brings a LoRA adapter, so it is another model; compare it in a run of its own")
    for checkpoint in checkpoints[1:]:
        checkpoint.load_onto(system.model)
    return system, [system.pruner, *(checkpoint.pruner for checkpoint in checkpoints[1:])]


def fresh(folders: o.Many, loading: o.Loading, output_dir: Path | None) -> tuple[Any, list[Any]]:
    """A system whose agents are still to be trained. Raises ConfigError for options that exclude each other."""
    from microglia.system import MicrogliaPruningSystem

    if folders or output_dir is None:
        raise ConfigError(
            "--train-pairs trains agents instead of loading them; leave --model-path out and give --output-dir"
        )
    return MicrogliaPruningSystem(loading.model or "reasoner", **loading.arguments()), []


def pairs(
    held_out: Any, seeds: list[int], output_dir: Path, source: str | None, data_dir: Path | None
) -> tuple[list[Any], list[Any]]:
    """Agents and static baselines of all seeds, trained by the demo's recipe or taken from an earlier run."""
    from microglia.experiments.demo import RECIPE
    from microglia.experiments.side_by_side import saved_pair

    made = []
    most = max(RECIPE.first.max_steps, RECIPE.second.max_steps, 1)
    for seed in seeds:
        with progress(f"training, seed {seed}", f"{output_dir / PAIRS} keeps the finished pairs: {GO_ON}") as update:
            place = output_dir / PAIRS / str(seed)

            def on_log(row: dict[str, Any], update: Any = update) -> None:
                update("steps", row["step"], most)

            made.append(saved_pair(held_out, RECIPE, seed, place, base_model=source, data_dir=data_dir, on_log=on_log))
    return [pair.agents for pair in made], [pair.static_baseline for pair in made]


def prepared(
    system: Any, examples: o.Examples, generation: o.Generation, answer_limit: float | None, num_runs: int
) -> tuple[Any, Any]:
    """What is compared on, and a function that draws training examples for criteria."""
    from microglia.experiments.compare import Comparison

    setup = generation.setup(system.model, system.tokenizer, examples.task(), examples.load(), answer_limit)
    other = "validation" if examples.split != "validation" else "train"
    held_out = replace(setup, examples=examples.load(split=other, limit=HELD_OUT), answer_limit=None)

    def training_examples(count: int | None, seed: int) -> Any:
        return examples.load(split="train", limit=count, seed=seed)

    like = replace(system.pruner.with_threshold(0.0), budget=None)
    return Comparison(setup, held_out, like, num_runs), training_examples


def records(result: Any) -> list[Any]:
    """One record per row, and one for what adaptivity adds."""
    from microglia.results import plain

    names = ("execution", "base_model", "max_new_tokens", "answer_limit")
    shared = {"dataset": result.dataset, "split": result.split, **{name: result.settings[name] for name in names}}
    record, gain = recorder(result.circumstances, result.settings["seed"], shared), result.adaptivity
    rows = [record("accuracy", row.accuracy, row.prompts, **plain(row)) for row in result.rows]
    return [*rows, record("adaptivity", gain.gain, result.rows[0].prompts, **plain(gain))]


def views(result: Any) -> list[Any]:
    """The table, and what it shows in sentences."""
    first, rows = result.rows[0], []
    for row in result.rows:
        time = []
        if latency := row.latency:
            time = [f"{latency.ms_per_token:.2f}", f"{latency.ratio_to_dense:.2f}×", f"{latency.kv_bytes / 1024:,.0f}"]
        best = bool(row.pareto_sparsity if row.pareto_latency is None else row.pareto_latency)
        rows.append(
            [
                row.policy + "*" * best,
                share(row.keep_ratio),
                f"{100 * row.accuracy:.1f} ({interval(row.ci95, '{:.0f}', sign='–')})",
                f"{row.loss:.3f}",
                f"{row.mean_tokens:.0f}",
                *time,
                f"{row.agents_to_this.p_holm:.2g}" if row.agents_to_this else "",
            ]
        )
    timed = ("ms", "faster", "KV KiB") if first.latency else ()
    families = [f"{name} {share(value)}" for name, value in result.sparsity_by_family.items() if name]
    return [
        table(
            f"{result.dataset}, {result.split}, {first.prompts} prompts",
            ("", "kept", "right, 95 %", "loss", "tokens", *timed, "p"),
            rows,
            fold=True,
        ),
        "p: against the agents at the same target, Holm-corrected. *: no other row is both as accurate and as "
        + ("fast. ms: of a step; faster: dense time ÷ this." if timed else "small."),
        adds(result.adaptivity),
        follows(result.follows_difficulty),
        *(["Heads pruned by family: " + ", ".join(families)] if families else []),
    ]
