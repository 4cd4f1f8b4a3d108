"""Write the figures on the pages from the records in results/.

    python scripts/update_figures.py           # rewrite
    python scripts/update_figures.py --check   # exit 1 if a page says something else than the records

A section stands between `<!-- figures: NAME -->` and `<!-- end -->`; nobody types a number there.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the bars of a GPU stand in its benchmark

from bench.gpu.bars import bars, decoded, share, speed  # noqa: E402
from scripts import llm_tables  # noqa: E402

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct"}
LABELS = {"dense": "dense", "pruned": "agents", "static_baseline": "static baseline", "random": "random masks"}


def read(name: str) -> list[Any]:
    """The records of a file in results/, none if it is not there."""
    path = RESULTS / name
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def points(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def times(value: float, interval: list[float]) -> str:
    return f"{value:.2f}× [{interval[0]:.2f}, {interval[1]:.2f}]"


def summary() -> str:
    """The first table of the README: accuracy, time and memory, and what they say about where pruning helps."""
    (record,) = read("compare/comparison.json")
    rows = {(row["policy"], row["target"]): row for row in record["rows"]}
    shown = [("dense", 1.0), *((name, ratio) for ratio in (0.75, 0.5) for name in ("agents", "static_baseline"))]
    seeds = len(rows["agents", 0.5]["seeds"])
    gains = {x["target"]: points(x["gain"], x["ci95"]) for x in record["by_keep_ratio"]}
    whole = "request" in rows["dense", 1.0]  # records of before 0.2.0 have decode steps of one prompt only
    column = "request speed-up | decode speed-up" if whole else "decode speed-up"
    large = [r["extra"] for r in read("cpu-phi3-mini.jsonl") if r["extra"]["variant"] == "compact"]
    full = next(r for r in large if r["keep_ratio"] == 0.5 and r["batch_size"] == 8)
    small = next(r for r in large if r["keep_ratio"] == 0.5 and r["batch_size"] == 1)
    return "\n".join(
        [
            f"| heads pruned | chosen by | accuracy | {column} | its ceiling | KV cache |",
            "|---|---|---|---|---|---|" + "---|" * whole,
            *(_summary_row(rows[key], rows["dense", 1.0]) for key in shown),
            "",
            f"The embedded reasoner (4.7 M parameters, float32), {rows['dense', 1.0]['prompts']} held-out problems, "
            f"{seeds} trainings, batch 1, {record['circumstances']['device']}; 95 % intervals. The *static baseline* "
            "is trained like the agents but sees no prompt. The *ceiling* is what the saved bytes allow: bytes of the "
            "dense step ÷ bytes of the pruned one.",
            "",
            f"- **Helps when few heads may stay:** at half of the heads the agents' accuracy is {gains[0.5]} above "
            "the static baseline's.",
            "- **Helps when the KV cache is large:** long contexts, large batches, no grouped queries. Half of the "
            f"heads of Phi-3-mini's shape: {full['ratio_to_dense']:.2f}× at {full['batch_size']} × "
            f"{full['context']:,} tokens, {small['ratio_to_dense']:.2f}× at {small['batch_size']} × "
            f"{small['context']:,} (random weights, same CPU).",
            "- **Does not help when many heads may stay:** at three quarters of the heads the static baseline is as "
            f"accurate ({gains[0.75]}). In measured time {_in_time(rows)}.",
            "- **Does not help when you need a large factor:** heads alone give about 1.05 to 1.25×, and the "
            "prompt is read with all of them.",
        ]
    )


def _in_time(rows: dict[Any, dict[str, Any]]) -> str:
    """Who is ahead in time at each budget, and whether the intervals say so."""
    said = []
    for ratio in (0.75, 0.5):
        pair = [(label, _time(rows[name, ratio])) for name, label in (("static_baseline", "it"), ("agents", "agents"))]
        (first, ahead), (_, behind) = sorted(pair, key=lambda one: -one[1]["ratio_to_dense"])
        sure = "surely" if ahead["ratio_ci95"][0] > behind["ratio_ci95"][1] else "though the intervals overlap"
        speeds = f"{ahead['ratio_to_dense']:.2f}× against {behind['ratio_to_dense']:.2f}×"
        said.append(f"{first} {'is' if first == 'it' else 'are'} ahead at {ratio:.0%} of the heads, {sure} ({speeds})")
    return ", and ".join(said)


def _time(row: dict[str, Any]) -> dict[str, Any]:
    return row.get("request") or row["latency"]


def _summary_row(row: dict[str, Any], dense: dict[str, Any]) -> str:
    low, high = row["ci95"]
    accuracy = f"{row['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    time, request = row.get("latency", {}), row.get("request")
    if request:
        speed = times(request["ratio_to_dense"], request["ratio_ci95"])
        step = times(time["ratio_to_dense"], time["ratio_ci95"])
        pruned, label = 1 - row["keep_ratio_per_token"], LABELS.get(row["policy"], row["policy"])
        memory = time["kv_bytes"] / dense["latency"]["kv_bytes"]
        return f"| {pruned:.0%} | {label} | {accuracy} | {speed} | {step} | {time['ceiling']:.2f}× | {memory:.0%} |"
    if row["policy"] == "dense":
        return f"| none | dense | {accuracy} | 1× | | 100% |"
    # Bytes of the timed prompts differ by their lengths too. Without grouped queries the share of heads is the cache's.
    return (
        f"| {1 - row['keep_ratio']:.0%} | {LABELS.get(row['policy'], row['policy'])} | {accuracy} "
        f"| {times(time['ratio_to_dense'], time['ratio_ci95'])} | {time['ceiling']:.2f}× | {time['keep_ratio']:.0%} |"
    )


def demo() -> str:
    """The demo's table and what it says of adaptivity."""
    (record,) = read("demo.json")
    rows = [
        "| chosen by | accuracy | heads pruned | difference to dense | answer tokens |",
        "|---|---|---|---|---|",
        *(_demo_row(LABELS[name], record[name]) for name in LABELS),
        *(_demo_row(LABELS[name], record["low_budget"][name]) for name in ("pruned", "static_baseline")),
    ]
    follows = record["follows_difficulty"]
    by_steps = ", ".join(f"{steps}: {value:.0%}" for steps, value in record["pruned"]["sparsity_by_difficulty"].items())
    made = record["circumstances"]
    return "\n".join(
        [
            f"`make demo`, {record['problems']} held-out problems of 1 to 8 steps, the embedded reasoner, "
            f"{made['device']}:",
            "",
            *rows,
            "",
            "Agents against the static baseline (same loss, no input) at the same sparsity: "
            f"{_adds(record)}, and {_adds(record['low_budget'])}. "
            f"Heads pruned by number of steps: {by_steps} (rank correlation {follows['rank_correlation']:+.2f}, "
            f"interval {follows['ci95'][0]:+.2f} to {follows['ci95'][1]:+.2f}). "
            f"The agents have {record['agent_parameters']:,} parameters, {record['agent_share']:.2%} of the model.",
        ]
    )


def _adds(record: dict[str, Any]) -> str:
    """What adapting to the prompt adds, with its interval."""
    gain, interval = record["adaptivity"]["gain"], record["adaptivity"]["ci95"]
    verdict = (
        "a gain" if interval[0] > 0 else "a loss" if interval[1] < 0 else "no difference that the interval supports"
    )
    sparsity = record["static_baseline"]["sparsity"]
    return f"{points(gain, interval)} with {sparsity:.0%} of the heads pruned, {verdict}"


def _demo_row(label: str, row: dict[str, Any]) -> str:
    difference = points(row["to_dense"]["diff"], row["to_dense"]["ci95"]) if row.get("to_dense") else ""
    tokens = f"{row['mean_tokens']:.0f}" if "mean_tokens" in row else ""
    return f"| {label} | {row['accuracy']:.1%} | {row['sparsity']:.1%} | {difference} | {tokens} |"


def latency() -> str:
    """Decode steps of random weights in full shapes: compact against dense, with ceiling and realised share."""
    records = read("cpu-phi3-mini.jsonl")
    rows = [r for r in records if r["extra"]["variant"] == "compact"]
    lines = [
        f"Decode steps on {records[0]['device']}, medians of interleaved pairs with 95 % intervals:",
        "",
        "| model | heads kept | batch, context | speed-up | ceiling | share | KV cache | paid back after |",
        "|---|---|---|---|---|---|---|---|",
        *(_latency_row(row["extra"]) for row in rows),
        "",
        "Share: of the time that the ceiling says could be saved, what was. Above 100 % the dense operations did not "
        "reach the memory's speed themselves.",
        "",
        "```bash",
        *sorted({row["command"] for row in rows}),
        "```",
    ]
    return "\n".join(lines)


def _latency_row(row: dict[str, Any]) -> str:
    share = "" if row["realised_share"] is None else f"{row['realised_share']:.0%}"
    per_row = ", per row" if row["decides"] == "per row" else ""
    tokens = f"{row['break_even_tokens']} tokens" if row["break_even_tokens"] else "never"
    return (
        f"| {row['model']}, {row['layers']} layers, {row['dtype']} | {row['keep_ratio']:.0%} "
        f"| {row['batch_size']}, {row['context']:,}{per_row} | {times(row['ratio_to_dense'], row['ratio_ci95'])} "
        f"| {row['ceiling']:.2f}× | {share} | {row['kv_bytes'] / 2**20:.1f} MiB | {tokens} |"
    )


def gpu_runs() -> list[list[dict[str, Any]]]:
    """The records of every run that decoded on a GPU, the newest last: `gpu.jsonl` after `gpu-*.jsonl`."""
    runs = [read(path.name) for path in sorted(RESULTS.glob("gpu*.jsonl"))]
    return [run for run in runs if any(record["name"] == "gpu_decode" for record in run)]


def gpu() -> str:
    """Decode steps on GPUs, a table for every run, and what was promised beside what was measured."""
    return "\n\n".join(_gpu_run(records) for records in gpu_runs())


def gpu_summary() -> str:
    """For the README: of the newest run, what was kept, what was missed, and what nobody has measured."""
    records = gpu_runs()[-1]
    held = bars(records)
    said = {
        verdict: [f"{bar.what}: {bar.measured} ({bar.asked})" for bar in held if bar.verdict == verdict]
        for verdict in ("kept", "MISSED")
    }
    missing = [bar.what for bar in held if bar.verdict == "not measured"]
    if all(record["extra"].get("random_weights", True) for record in records):
        missing.append("any model with its own weights, and what pruning does to its answers")
    return "\n".join(
        [
            f"**On a GPU** ({records[0]['device'].removesuffix(' (cuda)')}, bfloat16, Phi-3-mini's shape with random "
            f"weights, {_commits(records)}), what is [measured](docs/results.md#on-a-gpu), against its bar, "
            "and what is not:",
            "",
            f"- **Kept:** {'; '.join(said['kept'])}.",
            f"- **Missed:** {'; '.join(said['MISSED'])}.",
            f"- **Not measured:** {'; '.join(missing)}.",
        ]
    )


def _commits(records: list[dict[str, Any]]) -> str:
    """The code that was measured, which the present one may be ahead of."""
    names = dict.fromkeys(str(record["commit"]).partition("+")[0][:7] for record in records)
    return f"{'commit' if len(names) == 1 else 'commits'} {', '.join(names)}"


def _gpu_run(records: list[dict[str, Any]]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"Milliseconds of a decode step on {first['device']}, bfloat16, random weights, medians; {versions}, "
        f"{_commits(records)}. Speed-ups are over ours dense, each in its fastest way of attention; the share is that "
        "of the time which the saved bytes could save.",
        "",
        "| model | batch × context | step | ms | bytes alone | speed-up | ceiling | share | switch, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for place, variants in decoded(records).items():
        lines += [_gpu_row(place, variants, name) for name in variants if not name.startswith("masked")]
    lines += ["", *(_prefill(r["extra"] | {"value": r["value"]}) for r in records if r["name"] == "gpu_looking")]
    lines += [_training_step(r["extra"] | {"value": r["value"]}) for r in records if r["name"] == "gpu_training_step"]
    lines += ["", "| promised | bar | measured | |", "|---|---|---|---|"]
    lines += [f"| {bar.what} | {bar.asked} | {bar.measured} | {bar.verdict.lower()} |" for bar in bars(records)]
    return "\n".join([*lines, "", "```bash", *sorted({record["command"] for record in records}), "```"])


def _gpu_row(place: tuple[Any, ...], variants: dict[str, list[dict[str, Any]]], name: str) -> str:
    shape, layers, batch, context = place
    row, gain, of_ceiling = variants[name][0], speed(variants, name), share(variants, name)
    extra = row["extra"]
    pruned = extra.get("switch_ms") is not None
    cells = [
        f"{shape}, {layers} layers",
        f"{batch} × {context:,}",
        _step(name),
        f"{row['value']:.2f}",
        f"{extra['roof_ms']:.2f}" if "roof_ms" in extra else "",
        f"{gain:.2f}×" if gain is not None and name != "dense" else "",
        f"{extra['ceiling']:.2f}×" if pruned else "",
        f"{of_ceiling:.0%}" if pruned and of_ceiling is not None else "",
        f"{extra['switch_ms']:.2f}" if pruned else "",
    ]
    return f"| {' | '.join(cells)} |"


def _step(variant: str) -> str:
    """What a variant of the GPU's benchmark is called in a table."""
    named = {"hf": "the library's", "hf static compiled": "the library's, compiled", "dense": "ours, dense"}
    if variant in named:
        return named[variant]
    kind, _, ratio = variant.partition(" ")
    of = {"compact": "the heads", "rows": "the heads, each row its own"}.get(kind)
    return f"{float(ratio):.0%} of {of or 'all bytes, ' + ' and '.join(f'{unit}s' for unit in kind.split('+'))}"


def _prefill(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return (
        f"Reading {row['tokens']:,} tokens with {row['shape']}: {row['dense_ms']:.1f} ms; entropies add "
        f"{row['value']:+.1%} [{low:+.1%}, {high:+.1%}], statistics and decision {row['looking_and_deciding']:+.1%}."
    )


def _training_step(row: dict[str, Any]) -> str:
    peak = f", {row['peak_gib']:.1f} GiB at most" if row["peak_gib"] is not None else ""
    return (
        f"A training step of agents on {row['shape']} (frozen, gradient checkpointing, {row['batch']} × "
        f"{row['tokens']} tokens): {row['value']:,.0f} ms{peak}."
    )


def llm() -> str:
    """Every method on the pretrained models, a table each."""
    parts = []
    for name, title in MODELS.items():
        if (RESULTS / "llm" / name).is_dir():
            parts.append(f"{title}:\n\n{llm_tables.heads(RESULTS / 'llm' / name)}")
    return "\n\n".join(parts)


def llm_summary() -> str:
    """The pretrained models on the README: what a fifth of the heads costs, recovered or not."""
    lines = [
        "| model | heads pruned | chosen by | KL to dense, nats per token | same likeliest token |",
        "|---|---|---|---|---|",
    ]
    for name, title in MODELS.items():
        found = llm_tables.records(RESULTS / "llm" / name)
        for label, kl, top1 in llm_tables.at(found, 0.8):
            lines.append(f"| {title} | 20% | {label} | {kl} | {top1} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "demo": demo,
    "latency": latency,
    "gpu": gpu,
    "gpu_summary": gpu_summary,
    "llm": llm,
    "llm_summary": llm_summary,
}


def rendered(page: str) -> str:
    """The page with every section written anew."""
    pattern = r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{SECTIONS[m[2]]()}\n{m[3]}", page, flags=re.DOTALL)


def main() -> None:
    before = {path: path.read_text(encoding="utf-8") for path in PAGES}
    after = {path: rendered(page) for path, page in before.items()}
    if "--check" in sys.argv:
        sys.exit(int(before != after))
    for path, page in after.items():
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
