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
    from microglia.demo import demo as run

    stopped = f"what was trained so far is in {output_dir}, run the demo again to start anew"
    with progress("answering", stopped) as update:
        summary = run(output_dir, problems=problems, seed=seed, tell=tell, progress=update)
    return Outcome(summary, (comparison(summary), picture(summary), cost(summary), verdict(summary)))


LABELS = {
    "pruned": "pruned (agents)",
    "static": "static twin",
    "random": "random masks",
    "pruned, scarce": "agents, fewer heads",
    "static, scarce": "twin, fewer heads",
}


def comparison(summary: dict[str, Any]) -> Table:
    """One line per variant; differences to dense are paired on the same problems."""
    table = Table(title=f"{summary['problems']} held-out problems", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("", "right", "95 %", "heads pruned", "points to dense, 95 %", "tokens"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rows = {name: summary[name] for name in ("dense", "pruned", "static", "random")}
    rows |= {f"{name}, scarce": summary["scarce"][name] for name in ("pruned", "static")}
    for name, row in rows.items():
        low, high = row.get("accuracy_ci95", (None, None))
        diff = row.get("diff")
        table.add_row(
            LABELS.get(name, name),
            f"{row['accuracy']:.1%}",
            "" if low is None else f"{100 * low:.1f}–{100 * high:.1f}",
            f"{row['sparsity']:.1%}",
            ""
            if diff is None
            else f"{100 * diff:+.1f} [{100 * row['diff_ci95'][0]:+.1f}, {100 * row['diff_ci95'][1]:+.1f}]",
            f"{row['mean_tokens']:.0f}" if "mean_tokens" in row else "",
        )
    return table


def cost(summary: dict[str, Any]) -> Table:
    """What a decode step of one prompt costs, with the best that its kept heads allow."""
    dense, *_ = rows = summary["latency"]
    title = f"One prompt of {dense['context']} tokens, {dense['new_tokens']} new ones"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("", "ms/token", "speed-up", "95 %", "ceiling", "heads kept", "KV KiB"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        low, high = row["ratio_ci95"]
        ratio = (f"{row['ratio_to_dense']:.2f}×", f"{low:.2f}–{high:.2f}", f"{row['ceiling']:.2f}×")
        table.add_row(
            ROWS[row["variant"]],
            f"{row['ms_per_token']:.2f}",
            *(("", "", "") if row is dense else ratio),
            f"{row['keep_ratio']:.0%}",
            f"{row['kv_bytes'] / 1024:,.0f}",
        )
    return table


def picture(summary: dict[str, Any]) -> Text:
    """A bar per difficulty: the share of heads that problems with so many steps lose."""
    pruned = summary["pruned"]
    lines = ["Heads pruned by number of steps"]
    for steps, sparsity in pruned["sparsity_by_difficulty"].items():
        accuracy = pruned["accuracy_by_difficulty"][steps]
        lines.append(f"  {steps} {'█' * round(60 * sparsity):<40} {sparsity:6.1%} pruned, {accuracy:6.1%} right")
    return Text("\n".join(lines))


def verdict(summary: dict[str, Any]) -> Text:
    """What was found, in sentences."""
    follows = summary["sparsity_follows_difficulty"]
    rho, ends = follows["rank_correlation"], follows["ci95"]
    difficulty = (
        "Every problem lost the same number of heads."
        if rho is None
        else f"Rank correlation of steps and sparsity: {rho:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]."
    )
    return Text(
        f"{adds(summary['adaptivity'], summary['static']['sparsity'])}\n"
        f"{adds(summary['scarce']['adaptivity'], summary['scarce']['static']['sparsity'])}\n"
        f"{difficulty}\n"
        f"The agents have {summary['agent_parameters']:,} parameters ({summary['agent_share']:.2%} of the model); "
        f"{summary['seconds']:.0f} s in all."
    )


def adds(adaptivity: dict[str, Any], sparsity: float) -> str:
    """What looking at the prompt adds at this sparsity."""
    gain, (low, high) = adaptivity["gain"], adaptivity["ci95"]
    return (
        f"Agents against the static twin with {sparsity:.0%} of the heads pruned: {100 * gain:+.1f} points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}]: this run {'supports' if low > 0 else 'does not support'} a gain from "
        "adapting to the prompt."
    )
