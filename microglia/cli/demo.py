"""`microglia demo`: the main job on the embedded reasoner, with a table and a picture of sparsity by difficulty."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from microglia.cli import options as o
from microglia.cli.verb import Outcome, progress, tell, verb

ROWS = {
    "dense": "dense",
    "masked": "masked only",
    "compact": "compact",
    "compact_total": "with its decision",
}


@verb()
def demo(
    *,
    output_dir: Annotated[Path, "Folder for the summary, the answers and the checkpoint."] = Path("runs/demo"),
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems to answer.")] = 500,
    seed: o.Seed = 0,
) -> Outcome:
    """Train agents on the embedded reasoner and compare dense, pruned, static and random. Needs no network.

    microglia demo
    """
    from microglia.experiments.demo import demo as run

    with progress("answering", "nothing was kept, run the demo again to start anew") as update:
        result = run(output_dir, problems=problems, seed=seed, tell=tell, progress=update)
    return Outcome(result.to_json(), (comparison(result), picture(result), cost(result), verdict(result)))


def comparison(result: Any) -> Table:
    """One line per variant; differences to dense are paired on the same problems."""
    table = Table(title=f"{result.problems} held-out problems", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("", "right", "95 %", "heads pruned", "points to dense, 95 %", "tokens"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = {"dense": result.dense, "pruned (agents)": result.pruned, "static baseline": result.static_baseline}
    low = {"agents, fewer heads": result.low_budget.pruned, "baseline, fewer heads": result.low_budget.static_baseline}
    for name, row in (*rows.items(), ("random masks", result.random), *low.items()):
        cells = [name, f"{row.accuracy:.1%}", "", f"{row.sparsity:.1%}", "", ""]
        if row is not result.random:
            start, end = row.accuracy_ci95
            cells[2], cells[5] = f"{100 * start:.1f}–{100 * end:.1f}", f"{row.mean_tokens:.0f}"
            if row.to_dense:
                cells[4] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                    *(100 * x for x in (row.to_dense.diff, *row.to_dense.ci95))
                )
        table.add_row(*cells)
    return table


def cost(result: Any) -> Table:
    """What a decode step of one prompt costs, with the best that its kept heads allow."""
    dense, *_ = result.latency
    title = f"One prompt of {dense.context} tokens, {dense.new_tokens} new ones"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("", "ms/token", "speed-up", "95 %", "ceiling", "heads kept", "KV KiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in result.latency:
        low, high = row.ratio_ci95
        ratio = (f"{row.ratio_to_dense:.2f}×", f"{low:.2f}–{high:.2f}", f"{row.ceiling:.2f}×")
        table.add_row(
            ROWS[row.variant],
            f"{row.ms_per_token:.2f}",
            *(("", "", "") if row is dense else ratio),
            f"{row.keep_ratio:.0%}",
            f"{row.kv_bytes / 1024:,.0f}",
        )
    return table


def picture(result: Any) -> Text:
    """A bar per difficulty: the share of heads that problems with so many steps lose."""
    lines = ["Heads pruned by number of steps"]
    for steps, sparsity in result.pruned.sparsity_by_difficulty.items():
        accuracy = result.pruned.accuracy_by_difficulty[steps]
        lines.append(f"  {steps} {'█' * round(60 * sparsity):<40} {sparsity:6.1%} pruned, {accuracy:6.1%} right")
    return Text("\n".join(lines))


def verdict(result: Any) -> Text:
    """What the demo shows, in sentences."""
    difficulty = "Every problem lost the same number of heads."
    if follows := result.follows_difficulty:
        low, high = follows.ci95
        rho = follows.rank_correlation
        difficulty = f"Rank correlation of steps and sparsity: {rho:+.2f} [{low:+.2f}, {high:+.2f}]."
    return Text(
        f"{adds(result.adaptivity)}\n"
        f"{adds(result.low_budget.adaptivity)}\n"
        f"{difficulty}\n"
        f"The agents have {result.agent_parameters:,} parameters ({result.agent_share:.2%} of the model); "
        f"{result.seconds:.0f} s in all."
    )


def adds(adaptivity: Any) -> str:
    """What deciding by the prompt adds at this sparsity."""
    low, high = adaptivity.ci95
    return (
        f"Agents against the static baseline with {1 - adaptivity.keep_ratios['static_baseline']:.0%} of the heads "
        f"pruned: {100 * adaptivity.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]: this run "
        f"{'supports' if low > 0 else 'does not support'} a gain from adapting to the prompt."
    )
