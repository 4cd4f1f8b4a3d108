"""`microglia ablate`: what each part of the recipe is worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.settings import present_name
from microglia.cli.show import interval, points, share, table
from microglia.cli.verb import GO_ON, Outcome, progress, verb
from microglia.cli.writing import measured_on, recorder, write_run
from microglia.errors import ConfigError

LEDGER, SUMMARY = "ledger.jsonl", "ablation.json"
VARIED = "alpha, beta, temperature, policy, hidden-dim, signals, fill, bucket, lora"
BASE = "Base recipe: max-steps=400; repeat it for more."
HELD_OUT = 200  # prompts on which the keep ratio becomes a threshold


@verb()
def ablate(
    *,
    output_dir: Annotated[Path, "Folder for runs and records."] = Path("runs/ablation"),
    vary: Annotated[o.Many, "What to vary: beta=0,0.1; repeat it for more.", VARIED] = None,
    base: Annotated[o.Many, typer.Option("--set", help=BASE, show_default="the demo's")] = None,
    full_grid: Annotated[bool, "All combinations, not one change at a time."] = False,
    seeds: Annotated[o.Many, "Seeds of the trainings: 0,1,2.", "0"] = None,
    keep_ratio: Annotated[float, "Keep ratio at which all are compared."] = 0.75,
    as_trained: Annotated[bool, "Judge each at the keep ratio that its training led to as well."] = True,
    answer_limit: o.AnswerLimit = None,
    examples: o.Examples = o.Examples(split="validation"),
    generation: Annotated[o.Generation, Fields(without=("execution",))],
    loading: o.Unquantised = o.Loading(model="reasoner"),
) -> Outcome:
    """Train with one thing changed at a time and compare; finished runs are not repeated.

    microglia ablate --vary beta=0,0.01 --vary fill=zero,mean --seeds 0,1,2 --limit 500
    """
    from microglia.experiments.ablate import FACTORS, Ablation, Recipe, variants
    from microglia.experiments.ablate import ablate as measure
    from microglia.experiments.demo import RECIPE
    from microglia.ledger import Ledger
    from microglia.models import load_model
    from microglia.units import find_sites

    recipe = Recipe(RECIPE.second, RECIPE.policy, RECIPE.hidden_dim, baseline_steps=RECIPE.first.max_steps)
    for name, values in pairs("--set", base).items():
        recipe = recipe.changed(name, tuple(values) if len(values) > 1 else values[0])
    factors = pairs("--vary", vary) or FACTORS
    variants(recipe, factors, full_grid=full_grid)  # what is wrong with them is better known before loading a model
    o.check_output(output_dir)
    model, task, how = loading.model or "reasoner", examples.task(), loading.arguments()
    lm, tokenizer = load_model(model, **how)
    usual = {site.geometry.default_bucket for site in find_sites(lm)}
    usual_bucket = usual.pop() if len(usual) == 1 else None
    wanted = variants(recipe, factors, full_grid=full_grid, usual_bucket=usual_bucket)
    setup = generation.setup(lm, tokenizer, task, examples.load(), answer_limit)
    others = examples.load(split="train", limit=HELD_OUT, seed=examples.seed + 1)
    where, settings = examples.settings()
    settings |= {"model": loading.model, "answer_limit": answer_limit, "max_new_tokens": setup.max_new_tokens}
    ablation = Ablation(
        lambda: load_model(model, **how),
        setup,
        replace(setup, examples=others),
        keep_ratio,
        output_dir / "runs",
        examples.data_dir,
        as_trained,
        Ledger(output_dir / LEDGER, {**where, **settings}),
    )
    with progress("ablating", f"{output_dir / LEDGER} keeps the finished runs: {GO_ON}") as update:
        result = measure(replace(ablation, progress=update), wanted, o.numbers("--seeds", seeds, int) or [0])
    result = replace(result, **where, settings=settings, circumstances=measured_on(lm))
    write_run(output_dir / SUMMARY, result, records(result))
    return Outcome(result.to_json(), views(result))


def pairs(option: str, given: o.Many) -> dict[str, list[Any]]:
    """`["beta=0,0.1", "lora=none"]` → `{"beta": [0, 0.1], "lora": ["none"]}`; `default` as a bucket is heads / 8."""
    values_of: dict[str, list[Any]] = {}
    for text in given or ():
        name, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise ConfigError(f"{option} {text} was given; write NAME=VALUE or NAME=VALUE,VALUE")
        values_of[present_name(name.strip()).replace("-", "_")] = [_value(value.strip()) for value in values.split(",")]
    return values_of


def _value(word: str) -> Any:
    if word == "default":
        return None
    try:
        return json.loads(word)
    except ValueError:
        return word


def records(result: Any) -> list[Any]:
    """One record per variant: accuracy at the common keep ratio."""
    from microglia.results import plain

    names = ("dataset", "split", "at_keep_ratio", "base")
    shared = {**{name: result[name] for name in names}, "seeds": list(result.seeds), **result.settings}
    record = recorder(result.circumstances, shared.pop("seed"), shared)
    return [record("ablation_accuracy", row.accuracy, result.prompts, **plain(row)) for row in result.rows]


def views(result: Any) -> list[Any]:
    """One line per variant, and how to read it."""
    as_trained = result.rows[0].as_trained is not None
    rest = ("trained\nkept", "trained\nright") if as_trained else ("to base",)  # both do not fit 80 columns
    rows = []
    for row in result.rows:
        difference = ["", "", ""]
        if test := row.to_base:
            difference = [points(test.diff), interval(test.ci95, sign=" "), f"{test.p_holm:.2g}"]
        last = [f"{1000 * row.loss_to_base.diff:+.2g}" if row.loss_to_base else ""]
        if as_trained:
            last = [share(row.as_trained.keep_ratio), share(row.as_trained.accuracy)]
        rows.append([row.variant, share(row.accuracy), *difference, f"{1000 * row.loss:.3g}", *last])
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    title = f"{result.dataset}, {result.split}, {result.prompts} prompts, {seeds}"
    how = " Trained: at the keep ratio that the training itself led to." if as_trained else ""
    return [
        table(title, ("", "right", "to base", "95 %", "p", "loss", *rest), rows, padding=(0, 1), fold=True),
        f"Right, loss and differences with {share(result.at_keep_ratio, 0)} of the heads kept; p is Holm-corrected, "
        f"losses are in thousandths of a nat per token.{how}",
    ]
