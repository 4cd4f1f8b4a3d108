"""What runs left behind, read into one shape: results of policies, timings, training histories, circumstances.

Nothing is measured or estimated here. A figure that no file holds is None, and the page leaves it out. Results say of
what kind they are; other files are known by their names.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from microglia.errors import DataError
from microglia.record import Record, read_records
from microglia.results import (
    AblationResult,
    Adaptivity,
    AtBudget,
    BenchmarkResult,
    BenchmarkRow,
    Circumstances,
    ComparisonResult,
    Correlation,
    DemoResult,
    Difference,
    EvaluationResult,
    Latency,
    Promise,
    RequestTime,
    Summary,
    from_json,
    part_from_json,
)

HISTORY, CHECKPOINT, LEDGER = "history.json", "microglia_config.json", "ledger.jsonl"
NO_RESULTS = ("answers", "training_config", "sha256")  # JSON files in a folder of runs that begin so
UNFINISHED = "agents/checkpoint-*/trainer_state.json"  # of a training run that has no history yet


@dataclass(frozen=True)
class Entry:
    """What one policy did on the prompts of a run. `by`: sparsity or accuracy by difficulty or family; `heads`: per
    site and head how often it was kept, and its signals."""

    policy: str
    accuracy: float
    sparsity: float
    prompts: int
    ci95: tuple[float, float] | None = None
    to_dense: Difference | None = None
    mean_tokens: float | None = None
    by: dict[str, dict[str, float]] = field(default_factory=dict)
    heads: dict[str, list[list[float]]] = field(default_factory=dict)
    timing: BenchmarkRow | Latency | None = None
    request: RequestTime | None = None
    sparsity_per_token: float | None = None


@dataclass(frozen=True)
class Run:
    """Policies that answered the same prompts, the dense model first where it answered too.

    `low_budget`: agents and static baseline where fewer heads are kept.
    """

    title: str
    entries: tuple[Entry, ...]
    adaptivity: Adaptivity | None = None
    follows: Correlation | None = None
    low_budget: AtBudget | None = None


@dataclass(frozen=True)
class Timing:
    """A row of a benchmark, and what was measured."""

    row: BenchmarkRow
    model: str | None = None
    layers: int | None = None
    dtype: str | None = None
    device: str | None = None

    @classmethod
    def of(cls, row: BenchmarkRow, subject: dict[str, Any], device: str) -> "Timing":
        return cls(row, subject.get("model"), subject.get("layers"), subject.get("dtype"), device)


@dataclass
class Findings:
    """Everything that a page can show, in the order of the files."""

    runs: list[Run] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)
    ablations: list[AblationResult] = field(default_factory=list)
    circumstances: list[Circumstances] = field(default_factory=list)
    demos: list[DemoResult] = field(default_factory=list)

    def add_circumstances(self, circumstances: Circumstances) -> None:
        """Remember how something was measured, once."""
        if circumstances != Circumstances() and circumstances not in self.circumstances:
            self.circumstances.append(circumstances)


def gather(paths: Sequence[Path | str]) -> Findings:
    """Read runs: folders that a verb wrote, or single files of records or JSON.

    Raises DataError for what does not exist, cannot be read, or holds nothing that a page can show.
    """
    findings = Findings()
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"there is no run {path}; give a folder that microglia wrote, or a file of records")
        known = [_read(file, findings) for file in (_files(path) if path.is_dir() else [path])]
        if not any(known):
            raise DataError(
                f"{path} holds no results; give the --output-dir of demo, train, evaluate, compare or benchmark, or a "
                "file of theirs"
            )
    return findings


def _files(folder: Path) -> list[Path]:
    """Details before records, which fill in what is missing."""
    files = [*sorted(folder.glob("*.json")), *folder.glob(f"checkpoint/{CHECKPOINT}")]
    if not (folder / HISTORY).is_file():
        files += sorted(folder.glob(UNFINISHED), key=lambda p: int(p.parent.name.rpartition("-")[2]))[-1:]
    return files + sorted(folder.glob("*.jsonl"))


def _read(path: Path, findings: Findings) -> bool:
    """Whether `path` held something, which is then in `findings`."""
    if path.suffix == ".jsonl":
        return not path.name.endswith(LEDGER) and _records(read_records(path), findings)
    if path.name.startswith(NO_RESULTS):
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); mend it or leave it out") from error
    label = path.parent.name or path.stem
    try:
        if path.name == HISTORY:
            findings.histories[label] = _history(value)
        elif path.name == "trainer_state.json":
            findings.histories[path.parent.parent.parent.name] = _history(value["log_history"])
        elif path.name == CHECKPOINT:
            findings.checkpoints[label] = value
            if value.get("promise"):
                findings.promises[label] = from_json(value["promise"], f"the promise in {path}")
        else:
            result = from_json(value, str(path))
            if type(result) not in KNOWN:
                return False
            KNOWN[type(result)](result, label, findings)
            findings.add_circumstances(getattr(result, "circumstances", Circumstances()))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what microglia writes under that name; write it again") from error
    return True


def _history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "step": row["step"]} for row in rows]


def _demo(result: DemoResult, label: str, findings: Findings) -> None:
    before = {row.variant: row for row in result.latency}  # of records of before
    timing: dict[str, BenchmarkRow | Latency | None] = {**result.steps}
    entries = [
        _entry("dense", result.dense, timing.get("dense", before.get("dense")), request=result.requests.get("dense")),
        _entry(
            "pruned",
            result.pruned,
            timing.get("pruned", before.get("compact_total")),
            request=result.requests.get("pruned"),
        ),
        _entry(
            "static_baseline",
            result.static_baseline,
            timing.get("static_baseline"),
            request=result.requests.get("static_baseline"),
        ),
        *(_entry(f"random {number}", mask) for number, mask in enumerate(result.random.masks, 1)),
        _entry("pruned", result.low_budget.pruned),
        _entry("static_baseline", result.low_budget.static_baseline),
    ]
    title = f"Demo: {result.problems} held-out problems"
    run = Run(title, tuple(entries), result.adaptivity, result.follows_difficulty, result.low_budget)
    findings.runs.append(run)
    findings.timings += [Timing(row, "reasoner") for row in result.latency]
    findings.demos.append(result)


def _evaluation(result: EvaluationResult, label: str, findings: Findings) -> None:
    entries = [_entry("dense", result.dense)] if result.dense else []
    entries.append(_entry("pruned", result.pruned, to_dense=result.paired))
    findings.runs.append(Run(_title(result.dataset, result.split), tuple(entries)))


def _comparison(result: ComparisonResult, label: str, findings: Findings) -> None:
    entries = tuple(
        Entry(
            policy=row.policy,
            accuracy=row.accuracy,
            sparsity=1 - row.keep_ratio,
            prompts=row.prompts,
            ci95=row.ci95,
            to_dense=row.to_dense,
            mean_tokens=row.mean_tokens,
            timing=row.latency,
            request=row.request,
            sparsity_per_token=None if row.keep_ratio_per_token is None else 1 - row.keep_ratio_per_token,
        )
        for row in result.rows
    )
    title = f"Comparison: {_title(result.dataset, result.split)}"
    findings.runs.append(Run(title, entries, result.adaptivity, result.follows_difficulty))


def _benchmark(result: BenchmarkResult, label: str, findings: Findings) -> None:
    findings.timings += [Timing.of(row, result.subject, result.circumstances.device) for row in result.rows]


def _ablation(result: AblationResult, label: str, findings: Findings) -> None:
    findings.ablations.append(result)


def _promise(result: Promise, label: str, findings: Findings) -> None:
    findings.promises[label] = result


KNOWN: dict[type, Callable[[Any, str, Findings], None]] = {
    DemoResult: _demo,
    EvaluationResult: _evaluation,
    ComparisonResult: _comparison,
    BenchmarkResult: _benchmark,
    AblationResult: _ablation,
    Promise: _promise,
}


def _records(records: Sequence[Record], findings: Findings) -> bool:
    """Records of benchmarks, and of evaluations that are not there in detail."""
    names = {f.name for f in fields(BenchmarkRow)}
    for record in records:
        made = {f.name: getattr(record, f.name) for f in fields(Circumstances)}
        findings.add_circumstances(Circumstances(**made))
        if record.name == "decode_latency" and "variant" in record.extra:
            row = {name: value for name, value in record.extra.items() if name in names}
            row = part_from_json(BenchmarkRow, row, "a record of a benchmark")
            findings.timings.append(Timing.of(row, dict(record.extra), record.device))
    _evaluations(records, findings)
    return bool(records)


def _evaluations(records: Iterable[Record], findings: Findings) -> None:
    """`accuracy`, `sparsity` and `accuracy_difference` of `microglia evaluate`, the last of each task."""
    tasks: dict[str, dict[tuple[str, str], Record]] = {}
    for record in records:
        model = "pruned" if record.name == "accuracy_difference" else record.extra.get("model")
        if record.name in ("accuracy", "sparsity", "accuracy_difference") and model in ("dense", "pruned"):
            title = _title(record.extra.get("dataset"), record.extra.get("split"))
            tasks.setdefault(title, {})[model, record.name] = record
    shown = {run.title for run in findings.runs}
    for title, numbers in tasks.items():
        if title in shown:
            continue
        entries = []
        for model in ("dense", "pruned"):
            accuracy, sparsity = numbers.get((model, "accuracy")), numbers.get((model, "sparsity"))
            if accuracy is None or sparsity is None:
                continue
            ends, test = accuracy.extra.get("ci95"), numbers.get((model, "accuracy_difference"))
            names = [f.name for f in fields(Difference)]
            difference = {name: x for name, x in test.extra.items() if name in names} if test else None
            entries.append(
                Entry(
                    policy=model,
                    accuracy=accuracy.value,
                    sparsity=sparsity.value,
                    prompts=accuracy.n,
                    ci95=(ends[0], ends[1]) if ends else None,
                    to_dense=part_from_json(Difference, difference, "a record of an evaluation") if test else None,
                )
            )
        findings.runs.append(Run(title, tuple(entries)))


def _entry(
    policy: str,
    summary: Summary,
    timing: BenchmarkRow | Latency | None = None,
    *,
    to_dense: Difference | None = None,
    request: RequestTime | None = None,
) -> Entry:
    names = [f"{value}_by_{kind}" for value in ("accuracy", "sparsity") for kind in ("difficulty", "family")]
    by = {name: {group: x for group, x in getattr(summary, name).items() if group} for name in names}
    return Entry(
        policy=policy,
        accuracy=summary.accuracy,
        sparsity=summary.sparsity,
        prompts=summary.prompts,
        ci95=summary.accuracy_ci95,
        to_dense=to_dense or summary.to_dense,
        mean_tokens=summary.mean_tokens,
        by={name: groups for name, groups in by.items() if groups},
        heads=summary.heads,
        timing=timing,
        request=request,
        sparsity_per_token=summary.sparsity_per_token,
    )


def _title(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)
