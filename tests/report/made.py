"""Runs as the verbs write them, with made-up figures: small enough to read, different enough to be told apart."""

import json
from pathlib import Path

from microglia.record import Record, append_records

AROUND = {
    "device": "A quiet machine (cpu, 2 threads)",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "8060c961f7eaea404b7cee05ae8c1c7faa95ad07",
}
SITES, HEADS = 6, 8


def kept(site: int, head: int) -> float:
    """How often a head is kept: some always, some never, others sometimes."""
    return min(1.0, max(0.0, 1.35 - ((site * 5 + head * 3) % 8) / 6))


def heads() -> dict:
    return {
        "kept": [[round(kept(s, h), 4) for h in range(HEADS)] for s in range(SITES)],
        "entropy": [[round(0.15 + 0.8 * ((s + 2 * h) % 7) / 7, 4) for h in range(HEADS)] for s in range(SITES)],
        "norm": [[round((s + 1) * (0.2 + ((3 * h + s) % 8) / 8), 4) for h in range(HEADS)] for s in range(SITES)],
    }


def summary(accuracy: float, sparsity: float, **more) -> dict:
    steps = [str(n) for n in range(1, 9)]
    families = ["bare", "change", "compare", "groups", "percentages", "rates"]
    return {
        "prompts": 500,
        "accuracy": accuracy,
        "accuracy_ci95": [round(accuracy - 0.031, 4), round(accuracy + 0.029, 4)],
        "sparsity": sparsity,
        "accuracy_by_difficulty": {n: round(min(1, accuracy + 0.05 * (4.5 - i)), 4) for i, n in enumerate(steps)},
        "sparsity_by_difficulty": {n: round(sparsity * (1.25 - 0.07 * i), 4) for i, n in enumerate(steps)},
        "sparsity_by_family": {n: round(sparsity * (0.8 + 0.08 * i), 4) for i, n in enumerate(families)},
        "mean_tokens": 64.7,
        "seconds": 34.8,
        **more,
    }


def row(variant: str, ratio: float, *, context: int = 96, keep_ratio: float = 0.75, batch_size: int = 1) -> dict:
    """A row of a benchmark."""
    dense = variant == "dense"
    compact = variant.startswith("compact")
    ceiling = 1.0 if dense else 1.18
    return {
        "variant": variant,
        "batch_size": batch_size,
        "context": context,
        "keep_ratio": 1.0 if dense else keep_ratio,
        "ms_per_token": round(6.5 / ratio, 4),
        "ratio_to_dense": ratio,
        "ceiling": ceiling,
        "realised_share": None if dense else round((1 - 1 / ratio) / (1 - 1 / ceiling), 4),
        "kv_bytes": 900_000 if compact else 1_200_000,
        "peak_bytes": 210_000_000 if compact else 214_000_000,
        "break_even_tokens": 16 if compact else None,
        "p20": 5.0,
        "p80": 7.0,
        "n": 20,
        "ratio_ci95": [1.0, 1.0] if dense else [round(ratio - 0.05, 4), round(ratio + 0.06, 4)],
        "sparsity": 0.0 if dense else 1 - keep_ratio,
        "decides": "together",
        "weight_bytes": 16_000_000 if compact else 18_800_000,
    }


def history(steps: int = 60) -> list[dict]:
    return [
        {
            "step": step,
            "loss": 0.3,
            "task": round(1.4 * 0.96**step + 0.3, 4),
            "keep_ratio": round(1 - 0.28 * step / steps, 4),
            "target": 0.75,
            "multiplier": round(0.02 * step, 4),
            "temperature": 1.0,
            "noise": round(1 - step / steps, 4),
        }
        for step in range(2, steps + 1, 2)
    ]


def demo() -> dict:
    return {
        "dense": summary(0.914, 0.0),
        "pruned": summary(0.902, 0.2461, diff=-0.012, diff_ci95=[-0.028, 0.004], p_value=0.18, heads=heads()),
        "static": summary(0.861, 0.25, diff=-0.053, diff_ci95=[-0.074, -0.032], p_value=1.2e-6),
        "random": {
            "accuracy": 0.3,
            "sparsity": 0.25,
            "masks": [summary(0.42, 0.25), summary(0.18, 0.25)],
        },
        "adaptivity": {"gain": 0.041, "ci95": [0.02, 0.062], "p_value": 0.0001},
        "scarce": {
            "pruned": summary(0.855, 0.398, diff=-0.059, diff_ci95=[-0.08, -0.038], p_value=1e-7),
            "static": summary(0.801, 0.396, diff=-0.113, diff_ci95=[-0.14, -0.086], p_value=1e-12),
            "adaptivity": {"gain": 0.054, "ci95": [0.024, 0.084], "p_value": 0.0004},
        },
        "sparsity_follows_difficulty": {"rank_correlation": -0.41, "ci95": [-0.48, -0.33]},
        "latency": [row("dense", 1.0), row("masked", 0.95), row("compact", 1.13), row("compact_total", 1.1)],
        "agent_parameters": 19248,
        "agent_share": 0.0041,
        "seconds": 574.0,
        "problems": 500,
        "seed": 0,
        "circumstances": {**AROUND, "command": "microglia demo"},
    }


def comparison() -> dict:
    rows = [{**_cell("dense", 1.0, 0.914), "ratio_to_dense": 1.0, "ratio_ci95": [1.0, 1.0]}]
    for name, lost in (("agents", 0.3), ("gate", 0.5), ("norm", 0.9), ("taylor:per-input", 0.7), ("random", 1.6)):
        rows += [_cell(name, keep, round(0.914 - lost * (1 - keep) ** 1.5, 4)) for keep in (0.9, 0.75, 0.6)]
    return {
        "rows": rows,
        "adaptivity": {"gain": 0.02, "ci95": [0.004, 0.036]},
        "dataset": "gsm8k",
        "split": "test",
        **AROUND,
        "command": "microglia compare --model-path checkpoints --policies norm,taylor:per-input,random",
    }


def _cell(policy: str, keep: float, accuracy: float) -> dict:
    ratio = round(1 + 0.5 * (1 - keep), 4)
    return {
        "policy": policy,
        "keep_ratio": keep,
        "accuracy": accuracy,
        "ci95": [round(accuracy - 0.02, 4), round(accuracy + 0.02, 4)],
        "prompts": 1319,
        "mean_tokens": 98.0,
        "ratio_to_dense": ratio,
        "ratio_ci95": [round(ratio - 0.02, 4), round(ratio + 0.02, 4)],
        "ms_per_token": round(20 / ratio, 4),
        "ceiling": round(1 + 0.6 * (1 - keep), 4),
        "realised_share": 0.8,
        "kv_bytes": 4_000_000,
    }


def ablation() -> dict:
    base = {"variant": "base", "accuracy": 0.86, "loss": 0.071, "own_keep_ratio": 0.74, "own_accuracy": 0.85}
    changed = [("features norm", -0.021, [-0.038, -0.004], 0.03), ("gate soft", -0.4, [-0.45, -0.35], 1e-9)]
    rows = [
        {**base, "variant": name, "accuracy": round(0.86 + diff, 4), "diff": diff, "diff_ci95": ends, "p_holm": p}
        for name, diff, ends, p in changed
    ]
    about = {"base": {}, "at_keep_ratio": 0.75, "prompts": 500, "seeds": [0, 1, 2]}
    return {"rows": [base, *rows], **about, **AROUND, "command": "microglia ablate --vary features=both,norm"}


def promise() -> dict:
    tried = [
        {
            "target": 0.95,
            "keep_ratio": 0.951,
            "accuracy": 0.91,
            "lost": 2,
            "won": 1,
            "drop": 0.002,
            "drop_bound": 0.011,
        },
        {
            "target": 0.9,
            "keep_ratio": 0.904,
            "accuracy": 0.896,
            "lost": 9,
            "won": 2,
            "drop": 0.014,
            "drop_bound": 0.027,
        },
    ]
    return {"sentence": "95.1% of the heads are kept; with 95% confidence that costs at most 2 points", "tried": tried}


def ablation_folder(folder: Path) -> Path:
    """What `microglia ablate` leaves."""
    _write(folder / "ablation.json", ablation())
    (folder / "cells.jsonl").write_text('{"key": {}, "value": {}}\n')
    return folder


def calibrated_folder(folder: Path) -> Path:
    """What `microglia calibrate` leaves."""
    _write(folder / "microglia_config.json", {"base_model": "reasoner", "sites": [], "promise": promise()})
    return folder


def calibration_file(path: Path) -> Path:
    """What `microglia calibrate --json` prints."""
    _write(path, {"keep_ratio": 0.951, "max_drop": 0.02, **promise()})
    return path


def demo_folder(folder: Path) -> Path:
    """What `microglia demo` leaves."""
    _write(folder / "summary.json", demo())
    _write(folder / "history.json", history())
    _write(folder / "answers.json", {"dense": []})
    config = {"base_model": "reasoner", "sites": [], "training": {"config": {"batch_size": 32, "keep_ratio": 0.75}}}
    _write(folder / "checkpoint" / "microglia_config.json", config)
    return folder


def comparison_folder(folder: Path) -> Path:
    """What `microglia compare` leaves."""
    _write(folder / "comparison.json", comparison())
    (folder / "cells.jsonl").write_text('{"key": {}, "value": {}}\n')
    return folder


def evaluation_folder(folder: Path, *, details: bool = True) -> Path:
    """What `microglia evaluate` leaves; without details only its records."""
    result = {
        "dataset": "gsm8k",
        "split": "test",
        "pruned": summary(0.81, 0.22, heads=heads()),
        "dense": summary(0.82, 0.0),
        "paired": {"diff": -0.01, "diff_ci95": [-0.03, 0.01], "p_value": 0.4},
    }
    around = {**AROUND, "command": "microglia evaluate --dataset gsm8k"}
    about = {"dataset": "gsm8k", "split": "test"}
    records = [
        Record(number, result[name][number], "ratio", n=500, extra={**about, "model": name, **more}, **around)
        for name in ("dense", "pruned")
        for number, more in (("accuracy", {"ci95": result[name]["accuracy_ci95"]}), ("sparsity", {}))
    ]
    records.append(Record("accuracy_difference", -0.01, "ratio", n=500, extra={**about, **result["paired"]}, **around))
    append_records(folder / "records.jsonl", records)
    if details:
        _write(folder / "evaluation-gsm8k.json", {**result, "circumstances": around})
    return folder


def benchmark_file(path: Path) -> Path:
    """What `microglia benchmark --output` leaves."""
    about = {"model": "phi3-mini", "layers": 4, "weights": "random", "dtype": "bfloat16", "seed": 0}
    rows = [
        row(variant, ratio, context=context, keep_ratio=keep)
        for context, keep, gain in ((128, 0.75, 1.09), (1024, 0.75, 1.11), (1024, 0.5, 1.2))
        for variant, ratio in (("dense", 1.0), ("masked", 0.97), ("compact", gain), ("compact_total", gain - 0.01))
    ]
    around = {**AROUND, "command": "microglia benchmark --random-weights phi3-mini --layers 4 --keep-ratio 0.75,0.5"}
    append_records(
        path,
        [Record("decode_latency", r["ms_per_token"], "ms", n=20, extra={**about, **r}, **around) for r in rows],
    )
    return path


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
