"""`microglia ablate`: what each part of the recipe is worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.numbers import numbers
from microglia.cli.verb import GO_ON, Outcome, finite, progress, verb
from microglia.errors import ConfigError

CELLS, RECORDS, SUMMARY = "cells.jsonl", "records.jsonl", "ablation.json"
DIAL_PROMPTS = 200


@verb()
def ablate(
    *,
    output_dir: Annotated[Path, "Folder for results and records."] = Path("runs/ablation"),
    vary: Annotated[
        o.Many,
        "What to vary: beta=0,0.1; repeat it for more.",
        "alpha, beta, temperature, policy, hidden-dim, features, fill, bucket, lora",
    ] = None,
    base: Annotated[
        o.Many, typer.Option("--set", help="Base recipe: max-steps=400; repeat it for more.", show_default="the demo's")
    ] = None,
    full_grid: Annotated[
        bool, typer.Option("--full-grid", help="All combinations; otherwise one change at a time.")
    ] = False,
    seeds: Annotated[o.Many, "Seeds of the trainings: 0,1,2.", "0"] = None,
    keep_ratio: Annotated[float, "Keep ratio at which all are compared."] = 0.75,
    own: Annotated[bool, "Judge each at the keep ratio of its own training as well."] = True,
    answer_limit: o.AnswerLimit = None,
    examples: o.Examples = o.Examples(split="validation"),
    generation: Annotated[o.Generation, Fields(without=("execution",))],
    loading: o.Unquantised = o.Loading(model="reasoner"),
) -> Outcome:
    """Train with one thing changed at a time and compare; finished runs are not repeated.

    microglia ablate --vary beta=0,0.01 --vary fill=zero,mean --seeds 0,1,2 --limit 500
    """
    from microglia.ablation import FACTORS, Ground, Recipe, variants
    from microglia.ablation import ablate as measure
    from microglia.checkpoint import check_writable
    from microglia.demo import RECIPE
    from microglia.evaluation.bench import Bench
    from microglia.ledger import Ledger
    from microglia.models import load_model
    from microglia.record import append_records, circumstances
    from microglia.sites import find_sites

    recipe = Recipe(RECIPE.second, RECIPE.policy, RECIPE.hidden_dim, twin_steps=RECIPE.first.max_steps)
    for name, values in pairs("--set", base).items():
        recipe = recipe.changed(name, tuple(values) if len(values) > 1 else values[0])
    factors = pairs("--vary", vary) or FACTORS
    variants(recipe, factors, full_grid=full_grid)  # what is wrong with them is better known before loading a model
    check_writable(output_dir)
    model, task, how = loading.model or "reasoner", examples.task(), loading.arguments()
    lm, tokenizer = load_model(model, **how)
    usual = {max(1, site.geometry.heads // 8) for site in find_sites(lm)}
    usual_bucket = usual.pop() if len(usual) == 1 else None
    wanted = variants(recipe, factors, full_grid=full_grid, usual_bucket=usual_bucket)
    bench = Bench(lm, tokenizer, task, examples.load(), answer_room=answer_limit, **generation.how())
    others = examples.load(split="train", limit=DIAL_PROMPTS, seed=examples.seed + 1)
    ground = Ground(
        lambda: load_model(model, **how),
        bench,
        replace(bench, examples=others),
        keep_ratio,
        output_dir / "runs",
        examples.data_dir,
        own,
    )
    about = {"model": loading.model, **vars(examples), "max_new_tokens": generation.max_new_tokens}
    about |= {"answer_room": answer_limit, "data_dir": str(examples.data_dir or "")}
    ledger = Ledger(output_dir / CELLS, about)
    del about["data_dir"]
    with progress("ablating", f"{output_dir / CELLS} keeps the finished cells: {GO_ON}") as update:
        all_seeds = numbers("--seeds", seeds, int) or [0]
        found = measure(ground, wanted, all_seeds, ledger=ledger, progress=update)
    around = circumstances(lm.device)
    data = finite({**found, **about, **around})
    (output_dir / RECORDS).unlink(missing_ok=True)  # they are of this ablation, as the summary is
    append_records(output_dir / RECORDS, records(data, around))
    (output_dir / SUMMARY).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Outcome(data, views(data))


def pairs(option: str, given: o.Many) -> dict[str, list[Any]]:
    """`["beta=0,0.1", "lora=none"]` → `{"beta": [0, 0.1], "lora": ["none"]}`; `default` as a bucket is heads / 8."""
    found: dict[str, list[Any]] = {}
    for text in given or ():
        name, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise ConfigError(f"{option} {text} was given; write NAME=VALUE or NAME=VALUE,VALUE")
        found[name.strip().replace("-", "_")] = [_value(value.strip()) for value in values.split(",")]
    return found


def _value(word: str) -> Any:
    if word == "default":
        return None
    try:
        return json.loads(word)
    except ValueError:
        return word


def records(data: dict[str, Any], around: dict[str, Any]) -> list[Any]:
    """One record per variant: accuracy at the common keep ratio."""
    from microglia.record import Record

    told = ("model", "dataset", "split", "at_keep_ratio", "seeds", "base", "max_new_tokens", "answer_room")
    about = {name: data[name] for name in told}
    return [
        Record(
            "ablation_accuracy",
            row["accuracy"],
            "ratio",
            n=data["prompts"],
            seed=data["seed"],
            extra={**about, **row},
            **around,
        )
        for row in data["rows"]
    ]


def views(data: dict[str, Any]) -> list[Any]:
    """One line per variant, and how to read it."""
    seeds = f"{len(data['seeds'])} seed{'s' if len(data['seeds']) > 1 else ''}"
    title = f"{data['dataset']}, {data['split']}, {data['prompts']} prompts, {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")  # long names fold, so that the figures of a line fit 80 columns
    own = "own_accuracy" in data["rows"][0]
    rest = ("own\nkept", "own\nright") if own else ("to base",)  # both do not fit 80 columns
    for name in ("right", "to base", "95 %", "p", "loss", *rest):
        table.add_column(name, justify="right", no_wrap=True)
    for row in data["rows"]:
        difference, loss = ["", "", ""], ""
        if row.get("diff") is not None:
            low, high = row["diff_ci95"]
            ends = "" if low is None else f"{100 * low:+.1f} {100 * high:+.1f}"
            difference = [f"{100 * row['diff']:+.1f}", ends, f"{row['p_holm']:.2g}"]
            loss = f"{1000 * row['loss_diff']:+.2g}"
        table.add_row(
            row["variant"],
            f"{row['accuracy']:.1%}",
            *difference,
            f"{1000 * row['loss']:.3g}",
            *((f"{row['own_keep_ratio']:.1%}", f"{row['own_accuracy']:.1%}") if own else (loss,)),
        )
    how = " Own: at the keep ratio that the training itself led to." if own else ""
    return [
        table,
        f"Right, loss and differences with {data['at_keep_ratio']:.0%} of the heads kept; p is Holm-corrected, losses "
        f"are in thousandths of a nat per token.{how}",
    ]
