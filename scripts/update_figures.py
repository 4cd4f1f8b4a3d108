"""Write the README's figures from the records in results/.

    python scripts/update_figures.py           # rewrite
    python scripts/update_figures.py --check   # exit 1 if the README says something else than the records

A section stands between `<!-- figures: NAME -->` and `<!-- end -->`; nobody types a number there.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microglia.results import from_json

ROOT = Path(__file__).resolve().parents[1]
LABELS = {
    "dense": "dense",
    "pruned": "pruned (agents)",
    "static_baseline": "static baseline",
    "random": "random masks",
}


def demo() -> str:
    """The demo's table and what it says of adaptivity."""
    if not (ROOT / "results" / "demo.json").is_file():
        return "The demo's figures are not recorded yet; `make demo` finds them on your machine."
    record = from_json(json.loads((ROOT / "results" / "demo.json").read_text()), "results/demo.json")
    low, follows = record.low_budget, record.follows_difficulty
    rows = [
        "| | right | heads pruned | difference to dense | answer tokens |",
        "|---|---|---|---|---|",
        *(_demo_row(LABELS[name], record[name]) for name in LABELS),
        _demo_row(f"{LABELS['pruned']}, fewer heads", low.pruned),
        _demo_row(f"{LABELS['static_baseline']}, fewer heads", low.static_baseline),
    ]
    by_steps = ", ".join(f"{steps}: {value:.0%}" for steps, value in record.pruned.sparsity_by_difficulty.items())
    return "\n".join(
        [
            f"`make demo`, {record.problems} held-out problems of 1 to 8 steps, the embedded reasoner, "
            f"{record.circumstances.device}:",
            "",
            *rows,
            "",
            "Agents against their static baseline (same loss, no input) at the same sparsity: "
            f"{_adds(record.adaptivity)}, and {_adds(low.adaptivity)}. "
            f"Heads pruned by number of steps: {by_steps} (rank correlation {follows.rank_correlation:+.2f}, "
            f"interval {follows.ci95[0]:+.2f} to {follows.ci95[1]:+.2f}). "
            f"The agents have {record.agent_parameters:,} parameters, {record.agent_share:.2%} of the model.",
        ]
    )


def _adds(adaptivity: Any) -> str:
    """What deciding by the prompt adds, with its interval."""
    gain, (low, high) = adaptivity.gain, adaptivity.ci95
    meaning = "a gain" if low > 0 else "a loss" if high < 0 else "neither a gain nor a loss that the interval supports"
    return (
        f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] with "
        f"{1 - adaptivity.keep_ratios['static_baseline']:.0%} of the heads pruned, {meaning}"
    )


def _demo_row(label: str, row: Any) -> str:
    difference = ""
    if test := getattr(row, "to_dense", None):
        difference = f"{100 * test.diff:+.1f} points [{100 * test.ci95[0]:+.1f}, {100 * test.ci95[1]:+.1f}]"
    tokens = f"{row.mean_tokens:.0f}" if hasattr(row, "mean_tokens") else ""
    return f"| {label} | {row.accuracy:.1%} | {row.sparsity:.1%} | {difference} | {tokens} |"


def latency() -> str:
    """Decode steps of random weights in full shapes: compact against dense, with ceiling and realised share."""
    path = ROOT / "results" / "cpu-phi3-mini.jsonl"
    if not path.is_file():
        return "Latency on a quiet machine is not measured yet; `microglia benchmark` measures it on yours."
    records = [json.loads(line) for line in path.read_text().splitlines()]
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
    low, high = row["ratio_ci95"]
    share = "" if row["realised_share"] is None else f"{row['realised_share']:.0%}"
    per_row = ", per row" if row["decides"] == "per row" else ""
    tokens = f"{row['break_even_tokens']} tokens" if row["break_even_tokens"] else "never"
    return (
        f"| {row['model']}, {row['layers']} layers, {row['dtype']} | {row['keep_ratio']:.0%} "
        f"| {row['batch_size']}, {row['context']:,}{per_row} | {row['ratio_to_dense']:.2f}× [{low:.2f}, {high:.2f}] "
        f"| {row['ceiling']:.2f}× | {share} | {row['kv_bytes'] / 2**20:.1f} MiB | {tokens} |"
    )


def gpu() -> str:
    """Captured decode steps on a GPU, beside Hugging Face's; a sentence where nobody has measured them yet."""
    path = ROOT / "results" / "gpu.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["name"] == "gpu_decode":
            extra = record["extra"]
            cell = extra["shape"], extra["layers"], extra["batch"], extra["context"]
            cells.setdefault(cell, {})[extra["variant"]] = {"ms": record["value"], **extra}
    if not cells:
        return (
            "**GPU figures are not measured yet.** The path has run on an H100, as docs/gpu.md tells, and is tested on "
            "the CPU, with tapes\nthat replay recorded operations as CUDA graphs do."
        )
    looking = [r["extra"] | {"value": r["value"]} for r in records if r["name"] == "gpu_looking"]
    trained = [r["extra"] | {"value": r["value"]} for r in records if r["name"] == "gpu_training_step"]
    first = next(r for r in records if r["name"] == "gpu_decode")
    lines = [
        f"Milliseconds of a decode step on {first['device']}, bfloat16, medians of interleaved measurements:",
        "",
        "| model | batch, context | Hugging Face | static, compiled | ours dense | heads kept | ours compact "
        "| speed-up | ceiling | share | switch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, variants in cells.items():
        pruned = [name for name in variants if name.startswith(("compact", "rows"))]
        lines += [_gpu_row(cell, variants, name) for name in pruned]
    lines += ["", *(_looked(x) for x in looking), *(_trained(x) for x in trained), ""]
    return "\n".join([*lines, "```bash", *sorted({r["command"] for r in records}), "```"])


def _gpu_row(cell: tuple[Any, ...], variants: dict[str, dict[str, Any]], name: str) -> str:
    (shape, layers, batch, context), row = cell, variants[name]
    low, high = row["ratio_ci95"]
    kind, _, ratio = name.partition(" ")
    others = (f"{variants[x]['ms']:.2f}" if x in variants else "" for x in ("hf", "hf static compiled", "dense"))
    share = "" if row["realised_share"] is None else f"{row['realised_share']:.0%}"
    return (
        f"| {shape}, {layers} layers | {batch}, {context:,} | {' | '.join(others)} "
        f"| {float(ratio):.0%}{', per row' if kind == 'rows' else ''} | {row['ms']:.2f} "
        f"| {row['ratio_to_dense']:.2f}× [{low:.2f}, {high:.2f}] | {row['ceiling']:.2f}× | {share} "
        f"| {row['switch_ms']:.2f} |"
    )


def _looked(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return (
        f"Reading {row['tokens']:,} tokens with {row['shape']}: {row['dense_ms']:.1f} ms; entropies add "
        f"{row['value']:+.1%} [{low:+.1%}, {high:+.1%}], looking and deciding {row['looking_and_deciding']:+.1%}."
    )


def _trained(row: dict[str, Any]) -> str:
    peak = f", {row['peak_gib']:.1f} GiB at most" if row["peak_gib"] is not None else ""
    return (
        f"A training step of agents on {row['shape']} (frozen, gradient checkpointing, {row['batch']} × "
        f"{row['tokens']} tokens): {row['value']:,.0f} ms{peak}."
    )


SECTIONS: dict[str, Callable[[], str]] = {"demo": demo, "latency": latency, "gpu": gpu}


def rendered(readme: str) -> str:
    """The README with every section written anew."""
    for name, section in SECTIONS.items():
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(pattern, lambda m, section=section: f"{m[1]}{section()}\n{m[2]}", readme, flags=re.DOTALL)  # type: ignore[misc]
    return readme


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text()
    after = rendered(before)
    if "--check" in sys.argv:
        sys.exit(int(before != after))
    path.write_text(after)


if __name__ == "__main__":
    main()
