"""`microglia demo`: the main job on the embedded reasoner, with a table and a picture of sparsity by difficulty."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from microglia.cli import options as o
from microglia.cli.show import adds, follows, interval, points, share, table
from microglia.cli.verb import Outcome, progress, tell, verb


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
    return Outcome(result.to_json(), (comparison(result), picture(result), times(result), verdict(result)))


def comparison(result: Any) -> Any:
    """One line per policy; differences to dense are paired on the same problems."""
    low = result.low_budget
    summaries = {
        "dense": result.dense,
        "pruned (agents)": result.pruned,
        "static baseline": result.static_baseline,
        "random masks": None,
        "agents, low budget": low.pruned,
        "static, low budget": low.static_baseline,
    }
    rows = []
    for name, row in summaries.items():
        if row is None:  # means over several masks
            rows.append([name, share(result.random.accuracy), "", share(result.random.sparsity), "", "", ""])
            continue
        test = row.to_dense
        difference = f"{points(test.diff)} [{interval(test.ci95, sign=', ')}]" if test else ""
        ends = interval(row.accuracy_ci95, "{:.1f}", sign="–")
        per_token = "" if row.sparsity_per_token is None else share(row.sparsity_per_token)
        cells = [share(row.accuracy), ends, share(row.sparsity), per_token, difference, f"{row.mean_tokens:.0f}"]
        rows.append([name, *cells])
    columns = ("", "right", "95 %", "heads pruned", "per token", "points to dense, 95 %", "tokens")
    return table(f"{result.problems} held-out problems", columns, rows)


def picture(result: Any) -> Text:
    """A bar per difficulty: the share of heads that problems with so many steps lose."""
    lines = ["Heads pruned by number of steps"]
    for steps, sparsity in result.pruned.sparsity_by_difficulty.items():
        accuracy = result.pruned.accuracy_by_difficulty[steps]
        lines.append(f"  {steps} {'█' * round(60 * sparsity):<40} {sparsity:6.1%} pruned, {accuracy:6.1%} right")
    return Text("\n".join(lines))


def times(result: Any) -> Any:
    """Whole requests and decode steps, dense against dense first."""
    rows = []
    for name, request in result.requests.items():
        step, charged = result.steps[name], ", ".join(request.charged)
        speed = f"{request.ratio_to_dense:.2f}× ({interval(request.ratio_ci95, '{:.2f}', 1, '–')})"
        steps = [f"{step.ratio_to_dense:.2f}×", f"{step.ceiling:.2f}×", f"{step.kv_bytes / 1024:,.0f}"]
        rows.append([name.replace("_", " "), f"{request.ms:.0f}", speed, *steps, charged])
    prompts = next(iter(result.requests.values())).prompts
    columns = ("", "ms", "request, dense ÷ this", "step", "ceiling", "KV KiB", "charged")
    return table(f"Requests of {prompts} fixed prompts, each as long as the dense answer", columns, rows, fold=True)


def verdict(result: Any) -> Text:
    """What the demo shows, in sentences."""
    lines = [adds(result.adaptivity), adds(result.low_budget.adaptivity), follows(result.follows_difficulty)]
    agents = f"{result.agent_parameters:,} parameters ({result.agent_share:.2%} of the model)"
    return Text("\n".join([*lines, f"The agents have {agents}; {result.seconds:.0f} s in all."]))
