"""Runs as the verbs write them, with made-up figures: small enough to read, different enough to be told apart."""

import json
from dataclasses import asdict
from pathlib import Path

from microglia.benchmark.rows import records
from microglia.record import Record, append_records
from microglia.results import (
    AblationResult,
    AblationRow,
    Adaptivity,
    AtBudget,
    BenchmarkResult,
    BenchmarkRow,
    Circumstances,
    ComparisonResult,
    ComparisonRow,
    Correlation,
    DemoResult,
    Difference,
    EvaluationResult,
    Figures,
    Latency,
    Promise,
    RandomMasks,
    Result,
    Summary,
    Tried,
    plain,
)

AROUND = {
    "device": "A quiet machine (cpu, 2 threads)",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "8060c961f7eaea404b7cee05ae8c1c7faa95ad07",
}
SITES, HEADS = 6, 8


def around(command: str) -> Circumstances:
    return Circumstances(**AROUND, command=command)


def kept(site: int, head: int) -> float:
    """How often a head is kept: some always, some never, others sometimes."""
    return min(1.0, max(0.0, 1.35 - ((site * 5 + head * 3) % 8) / 6))


def heads() -> dict:
    return {
        "kept": [[round(kept(s, h), 4) for h in range(HEADS)] for s in range(SITES)],
        "entropy": [[round(0.15 + 0.8 * ((s + 2 * h) % 7) / 7, 4) for h in range(HEADS)] for s in range(SITES)],
        "norm": [[round((s + 1) * (0.2 + ((3 * h + s) % 8) / 8), 4) for h in range(HEADS)] for s in range(SITES)],
    }


def summary(accuracy: float, sparsity: float, *difference, heads: dict | None = None) -> Summary:
    steps = [str(n) for n in range(1, 9)]
    families = ["bare", "change", "compare", "groups", "percentages", "rates"]
    return Summary(
        prompts=500,
        accuracy=accuracy,
        accuracy_ci95=(round(accuracy - 0.031, 4), round(accuracy + 0.029, 4)),
        sparsity=sparsity,
        accuracy_by_difficulty={n: round(min(1, accuracy + 0.05 * (4.5 - i)), 4) for i, n in enumerate(steps)},
        sparsity_by_difficulty={n: round(sparsity * (1.25 - 0.07 * i), 4) for i, n in enumerate(steps)},
        accuracy_by_family={},
        sparsity_by_family={n: round(sparsity * (0.8 + 0.08 * i), 4) for i, n in enumerate(families)},
        mean_tokens=64.7,
        seconds=34.8,
        heads=heads or {},
        to_dense=Difference(*difference) if difference else None,
    )


def row(
    variant: str, ratio: float, *, context: int = 96, keep_ratio: float = 0.75, batch_size: int = 1
) -> BenchmarkRow:
    dense = variant == "dense"
    compact = variant.startswith("compact")
    ceiling = 1.0 if dense else 1.18
    return BenchmarkRow(
        variant=variant,
        batch_size=batch_size,
        context=context,
        keep_ratio=1.0 if dense else keep_ratio,
        ms_per_token=round(6.5 / ratio, 4),
        ratio_to_dense=ratio,
        ceiling=ceiling,
        realised_share=None if dense else round((1 - 1 / ratio) / (1 - 1 / ceiling), 4),
        kv_bytes=900_000 if compact else 1_200_000,
        peak_bytes=210_000_000 if compact else 214_000_000,
        break_even_tokens=16 if compact else None,
        p20=5.0,
        p80=7.0,
        n=20,
        ratio_ci95=(1.0, 1.0) if dense else (round(ratio - 0.05, 4), round(ratio + 0.06, 4)),
        sparsity=0.0 if dense else 1 - keep_ratio,
        decides="together",
        weight_bytes=16_000_000 if compact else 18_800_000,
        bytes_per_token=20_000_000,
        prefill_flops=1,
        step_flops=1,
        first_token_ms=1.0,
        request_ms=1.0,
        request_ratio=1.0,
        new_tokens=64,
    )


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


def adaptivity(gain: float, ci95: tuple[float, float], kept: float = 0.75) -> Adaptivity:
    keep_ratios = {"agents": kept, "static_baseline": kept}
    return Adaptivity(gain=gain, ci95=ci95, p_value=0.0001, target=kept, keep_ratios=keep_ratios)


def demo() -> DemoResult:
    return DemoResult(
        dense=summary(0.914, 0.0),
        pruned=summary(0.902, 0.2461, -0.012, (-0.028, 0.004), 0.18, heads=heads()),
        static_baseline=summary(0.861, 0.25, -0.053, (-0.074, -0.032), 1.2e-6),
        random=RandomMasks(accuracy=0.3, sparsity=0.25, masks=(summary(0.42, 0.25), summary(0.18, 0.25))),
        adaptivity=adaptivity(0.041, (0.02, 0.062)),
        low_budget=AtBudget(
            pruned=summary(0.855, 0.398, -0.059, (-0.08, -0.038), 1e-7),
            static_baseline=summary(0.801, 0.396, -0.113, (-0.14, -0.086), 1e-12),
            adaptivity=adaptivity(0.054, (0.024, 0.084), 0.6),
        ),
        follows_difficulty=Correlation(-0.41, (-0.48, -0.33)),
        latency=(row("dense", 1.0), row("masked", 0.95), row("compact", 1.13), row("compact_total", 1.1)),
        agent_parameters=19248,
        agent_share=0.0041,
        seconds=574.0,
        problems=500,
        seed=0,
        circumstances=around("microglia demo"),
    )


def comparison() -> ComparisonResult:
    rows = [_row("dense", 1.0, 0.914)]
    for name, lost in (
        ("agents", 0.3),
        ("static_baseline", 0.5),
        ("norm", 0.9),
        ("taylor:per-input", 0.7),
        ("random", 1.6),
    ):
        rows += [_row(name, keep, round(0.914 - lost * (1 - keep) ** 1.5, 4)) for keep in (0.9, 0.75, 0.6)]
    command = "microglia compare --model-path checkpoints --policies norm,taylor:per-input,random"
    return ComparisonResult(
        rows=tuple(rows),
        adaptivity=adaptivity(0.02, (0.004, 0.036)),
        by_keep_ratio=(),
        follows_difficulty=None,
        sparsity_by_difficulty={},
        sparsity_by_family={},
        dataset="gsm8k",
        split="test",
        circumstances=around(command),
    )


def _row(policy: str, keep: float, accuracy: float) -> ComparisonRow:
    ratio = round(1 + 0.5 * (1 - keep), 4)
    return ComparisonRow(
        policy=policy,
        target=keep,
        keep_ratio=keep,
        accuracy=accuracy,
        ci95=(round(accuracy - 0.02, 4), round(accuracy + 0.02, 4)),
        loss=0.1,
        loss_ci95=(0.1, 0.1),
        prompts=1319,
        mean_tokens=98.0,
        seeds=(0,),
        pareto_sparsity=True,
        latency=Latency(
            keep_ratio=keep,
            ratio_to_dense=ratio,
            ratio_ci95=(1.0, 1.0) if policy == "dense" else (round(ratio - 0.02, 4), round(ratio + 0.02, 4)),
            ms_per_token=round(20 / ratio, 4),
            ceiling=round(1 + 0.6 * (1 - keep), 4),
            realised_share=0.8,
            kv_bytes=4_000_000,
        ),
    )


def ablation() -> AblationResult:
    common = {"keep_ratio": 0.75, "ci95": (0.8, 0.9), "loss": 0.071, "loss_ci95": (0.06, 0.08)}
    trained = Figures(**{**common, "keep_ratio": 0.74}, accuracy=0.85)
    shared = {**common, "as_trained": trained, "changes": {}, "seconds": 1.0, "agent_parameters": 7}
    changed = [("features norm", -0.021, (-0.038, -0.004), 0.03), ("gate soft", -0.4, (-0.45, -0.35), 1e-9)]
    rows = [
        AblationRow(variant=name, accuracy=round(0.86 + diff, 4), to_base=Difference(diff, ends, p, p), **shared)
        for name, diff, ends, p in changed
    ]
    return AblationResult(
        rows=(AblationRow(variant="base", accuracy=0.86, **shared), *rows),
        base={},
        at_keep_ratio=0.75,
        prompts=500,
        seeds=(0, 1, 2),
        circumstances=around("microglia ablate --vary features=both,norm"),
    )


def promise() -> Promise:
    tried = [(0.95, 0.951, 0.91, 2, 1, 0.002, 0.011), (0.9, 0.904, 0.896, 9, 2, 0.014, 0.027)]
    names = ("target", "keep_ratio", "accuracy", "lost", "won", "drop", "drop_bound")
    return Promise(
        keep_ratio=0.951,
        threshold=0.5,
        drop=0.002,
        drop_bound=0.011,
        confidence=0.95,
        prompts=500,
        max_drop=0.02,
        dense_accuracy=0.912,
        accuracy=0.91,
        tried=tuple(Tried(threshold=0.5, **dict(zip(names, row, strict=True))) for row in tried),
        sentence="95.1% of the heads are kept; with 95% confidence that costs at most 2 points",
    )


def ablation_folder(folder: Path) -> Path:
    """What `microglia ablate` leaves."""
    _write(folder / "ablation.json", ablation())
    (folder / "ledger.jsonl").write_text('{"key": {}, "value": {}}\n')
    return folder


def calibrated_folder(folder: Path) -> Path:
    """What `microglia calibrate` leaves."""
    _write(folder / "microglia_config.json", {"base_model": "reasoner", "sites": [], "promise": promise().to_json()})
    return folder


def calibration_file(path: Path) -> Path:
    """What `microglia calibrate --json` prints."""
    _write(path, promise())
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
    (folder / "ledger.jsonl").write_text('{"key": {}, "value": {}}\n')
    return folder


def evaluation_folder(folder: Path, *, details: bool = True) -> Path:
    """What `microglia evaluate` leaves; without details only its records."""
    made = around("microglia evaluate --dataset gsm8k")
    result = EvaluationResult(
        dataset="gsm8k",
        split="test",
        shots=0,
        scoring="generation",
        accuracy=0.81,
        sparsity=0.22,
        pruned=summary(0.81, 0.22, heads=heads()),
        dense=summary(0.82, 0.0),
        paired=Difference(-0.01, (-0.03, 0.01), 0.4),
        circumstances=made,
    )
    about = {"dataset": "gsm8k", "split": "test"}
    numbers = [
        Record(
            number,
            getattr(result[name], number),
            "ratio",
            n=500,
            extra={**about, "model": name, **more},
            **asdict(made),
        )
        for name in ("dense", "pruned")
        for number, more in (("accuracy", {"ci95": list(result[name].accuracy_ci95)}), ("sparsity", {}))
    ]
    extra = {**about, **plain(result.paired)}
    numbers.append(Record("accuracy_difference", -0.01, "ratio", n=500, extra=extra, **asdict(made)))
    append_records(folder / "records.jsonl", numbers)
    if details:
        _write(folder / "evaluation-gsm8k.json", result)
    return folder


def benchmark_file(path: Path) -> Path:
    """What `microglia benchmark --output` leaves."""
    about = {"model": "phi3-mini", "layers": 4, "weights": "random", "dtype": "bfloat16", "seed": 0}
    rows = [
        row(variant, ratio, context=context, keep_ratio=keep)
        for context, keep, gain in ((128, 0.75, 1.09), (1024, 0.75, 1.11), (1024, 0.5, 1.2))
        for variant, ratio in (("dense", 1.0), ("masked", 0.97), ("compact", gain), ("compact_total", gain - 0.01))
    ]
    made = around("microglia benchmark --random-weights phi3-mini --layers 4 --keep-ratio 0.75,0.5")
    append_records(path, records(BenchmarkResult(rows=tuple(rows), subject=about, circumstances=made)))
    return path


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value.to_json() if isinstance(value, Result) else value))
