"""What runs left behind, read into one shape: results of policies, timings, training histories, circumstances.

Nothing is measured or estimated here. A figure that no file holds is None, and the page leaves it out.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from microglia.errors import DataError
from microglia.record import Record, read_records

# What else than the JSON files directly in a folder belongs to its run.
BESIDE = ("checkpoint/microglia_config.json",)
CHECKPOINTS = "agents/checkpoint-*/trainer_state.json"  # of a training run that has no history yet
CIRCUMSTANCES = ("device", "versions", "commit", "command")
TIMED = ("dense", "masked", "compact", "compact_total")


@dataclass(frozen=True)
class Result:
    """What one policy did on the prompts of a run. `by`: sparsity or accuracy by difficulty or family; `heads`: per
    site and head how often it was kept, and its signals; `timing`: its row of a benchmark."""

    policy: str
    accuracy: float
    sparsity: float
    prompts: int
    ci95: tuple[float, float] | None = None
    diff: float | None = None
    diff_ci95: tuple[float, float] | None = None
    p_value: float | None = None
    mean_tokens: float | None = None
    by: dict[str, dict[str, float]] = field(default_factory=dict)
    heads: dict[str, list[list[float]]] = field(default_factory=dict)
    timing: dict[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """Policies that answered the same prompts, the dense model first where it was asked.

    `scarce`: what adapting adds where fewer heads are kept, with their `sparsity`.
    """

    title: str
    results: tuple[Result, ...]
    adaptivity: dict[str, Any] | None = None
    follows: dict[str, Any] | None = None
    scarce: dict[str, Any] | None = None


@dataclass(frozen=True)
class Variant:
    """One recipe of an ablation at the common keep ratio; `own`: accuracy and sparsity at what its training led to,
    None where that was not judged."""

    name: str
    accuracy: float
    loss: float
    own: tuple[float, float] | None
    diff: float | None
    diff_ci95: tuple[float, float] | None
    p_value: float | None


@dataclass(frozen=True)
class Ablation:
    """Recipes on the same prompts, the base first."""

    variants: tuple[Variant, ...]
    keep_ratio: float
    prompts: int
    seeds: int


@dataclass
class Findings:
    """Everything that a page can show, in the order it was given."""

    runs: list[Run] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    promises: dict[str, dict[str, Any]] = field(default_factory=dict)
    ablations: list[Ablation] = field(default_factory=list)
    circumstances: list[dict[str, Any]] = field(default_factory=list)
    agents: dict[str, Any] = field(default_factory=dict)

    def made(self, circumstances: dict[str, Any]) -> None:
        """Remember how something was measured, once."""
        found = {name: circumstances[name] for name in CIRCUMSTANCES if circumstances.get(name)}
        if found and found not in self.circumstances:
            self.circumstances.append(found)


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
    found = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith("answers")]
    found += [path for name in BESIDE if (path := folder / name).is_file()]
    if not (folder / "history.json").is_file():
        found += sorted(folder.glob(CHECKPOINTS), key=lambda p: int(p.parent.name.rpartition("-")[2]))[-1:]
    return found + sorted(folder.glob("*.jsonl"))


def _read(path: Path, findings: Findings) -> bool:
    """Whether `path` held something, which is then in `findings`."""
    try:
        if path.suffix == ".jsonl":
            return _ledger_or_records(path, findings)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); mend it or leave it out") from error
    try:
        return _value(value, path, findings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} lacks what a report needs of it ({type(error).__name__}: {error}); write it again with this "
            "version of microglia"
        ) from error


def _value(value: Any, path: Path, findings: Findings) -> bool:
    label = path.parent.name or path.stem
    if isinstance(value, list) and value and isinstance(value[0], dict) and "step" in value[0]:
        findings.histories[label] = value
    elif not isinstance(value, dict):
        return False
    elif "log_history" in value:
        findings.histories[path.parent.parent.parent.name] = value["log_history"]
    elif "adaptivity" in value and "dense" in value:
        _demo(value, findings)
    elif "pruned" in value and "dataset" in value:
        _evaluation(value, findings)
    elif "rows" in value and "base" in value:
        _ablation(value, findings)
    elif "rows" in value and "variant" in value["rows"][0]:
        about = {"device": value.get("device"), **value.get("subject", {})}
        findings.timings += [{**about, **row} for row in value["rows"]]
        findings.made(value)
    elif "rows" in value and "policy" in value["rows"][0]:
        _comparison(value, findings)
    elif "base_model" in value and "sites" in value:
        findings.checkpoints[label] = value
        if (value.get("promise") or {}).get("sentence"):
            findings.promises[label] = value["promise"]
    elif "sentence" in value and "tried" in value:
        findings.promises[label] = value
    else:
        return False
    return True


def _demo(value: dict[str, Any], findings: Findings) -> None:
    timing = {row["variant"]: row for row in value.get("latency", [])}
    masks = value["random"].get("masks", [])
    rows = {name: value[name] for name in ("dense", "pruned", "static")}
    rows |= {f"random {number}": mask for number, mask in enumerate(masks, 1)}
    timed = {"dense": timing.get("dense"), "pruned": timing.get("compact_total")}
    results = [_result(name, row, timed.get(name)) for name, row in rows.items()]
    fewer, scarce = value.get("scarce"), None
    if fewer:
        results += [_result(name, fewer[name], None) for name in ("pruned", "static")]
        scarce = {**fewer["adaptivity"], "sparsity": fewer["pruned"]["sparsity"]}
    title = f"Demo: {value['problems']} held-out problems"
    follows = value.get("sparsity_follows_difficulty")
    findings.runs.append(Run(title, tuple(results), value["adaptivity"], follows, scarce))
    findings.timings += [{"model": "reasoner", **row} for row in value.get("latency", [])]
    findings.agents |= {name: value[name] for name in ("agent_parameters", "agent_share") if name in value}
    findings.made(value.get("circumstances", {}))


def _evaluation(value: dict[str, Any], findings: Findings) -> None:
    paired = value.get("paired", {})
    rows = {name: value[name] for name in ("dense", "pruned") if name in value}
    results = [_result(name, row | (paired if name == "pruned" else {}), None) for name, row in rows.items()]
    findings.runs.append(Run(_title(value), tuple(results)))
    findings.made(value.get("circumstances", {}))


def _comparison(value: dict[str, Any], findings: Findings) -> None:
    results = []
    for row in value["rows"]:
        timed = row if row.get("ratio_to_dense") is not None else None
        results.append(
            Result(
                policy=row["policy"],
                accuracy=row["accuracy"],
                sparsity=1 - row["keep_ratio"],
                prompts=row["prompts"],
                ci95=_pair(row.get("ci95")),
                diff=row.get("diff"),
                diff_ci95=_pair(row.get("diff_ci95")),
                p_value=row.get("p_holm", row.get("p_value")),
                mean_tokens=row.get("mean_tokens"),
                timing=timed,
            )
        )
    run = Run(f"Comparison: {_title(value)}", tuple(results), value.get("adaptivity"), value.get("follows_difficulty"))
    findings.runs.append(run)
    findings.made(value)


def _ablation(value: dict[str, Any], findings: Findings) -> None:
    variants = tuple(
        Variant(
            name=row["variant"],
            accuracy=row["accuracy"],
            loss=row["loss"],
            own=(row["own_accuracy"], 1 - row["own_keep_ratio"]) if "own_accuracy" in row else None,
            diff=row.get("diff"),
            diff_ci95=_pair(row.get("diff_ci95")),
            p_value=row.get("p_holm"),
        )
        for row in value["rows"]
    )
    findings.ablations.append(Ablation(variants, value["at_keep_ratio"], value["prompts"], len(value["seeds"])))
    findings.made(value)


def _ledger_or_records(path: Path, findings: Findings) -> bool:
    """Records of evaluations that are not there in detail, and of benchmarks; other JSON lines are passed over."""
    first = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()), "{}")
    if "unit" not in json.loads(first):
        return False
    records = read_records(path)
    for record in records:
        findings.made(asdict(record))
        if record.name == "decode_latency" and record.extra.get("variant") in TIMED:
            findings.timings.append({"n": record.n, "device": record.device, **record.extra})
    _evaluations(records, findings)
    return bool(records)


def _evaluations(records: Iterable[Record], findings: Findings) -> None:
    """`accuracy`, `sparsity` and `accuracy_difference` of `microglia evaluate`, the last of each task."""
    tasks: dict[tuple[Any, Any], dict[str, dict[str, Record]]] = {}
    for record in records:
        task = (record.extra.get("dataset"), record.extra.get("split"))
        if record.name in ("accuracy", "sparsity") and record.extra.get("model") in ("dense", "pruned"):
            tasks.setdefault(task, {}).setdefault(record.extra["model"], {})[record.name] = record
        elif record.name == "accuracy_difference" and task in tasks:
            tasks[task].setdefault("pruned", {})["difference"] = record
    told = {run.title for run in findings.runs}
    for (dataset, split), models in tasks.items():
        if (title := _title({"dataset": dataset, "split": split})) in told:
            continue
        results = []
        for name in ("dense", "pruned"):
            if not {"accuracy", "sparsity"} <= (found := models.get(name, {})).keys():
                continue
            row = {**found["accuracy"].extra, **found["difference"].extra} if "difference" in found else {}
            row |= {"accuracy_ci95": found["accuracy"].extra.get("ci95"), "accuracy": found["accuracy"].value}
            row |= {"sparsity": found["sparsity"].value, "prompts": found["accuracy"].n}
            results.append(_result(name, row, None))
        findings.runs.append(Run(title, tuple(results)))


def _result(policy: str, row: dict[str, Any], timing: dict[str, Any] | None) -> Result:
    by = {name: values for name, values in row.items() if "_by_" in name and values}
    return Result(
        policy=policy,
        accuracy=row["accuracy"],
        sparsity=row["sparsity"],
        prompts=row["prompts"],
        ci95=_pair(row.get("accuracy_ci95")),
        diff=row.get("diff"),
        diff_ci95=_pair(row.get("diff_ci95")),
        p_value=row.get("p_value"),
        mean_tokens=row.get("mean_tokens"),
        by={name: {group: value for group, value in values.items() if group} for name, values in by.items()},
        heads=row.get("heads") or {},
        timing=timing,
    )


def _title(value: dict[str, Any]) -> str:
    return ", ".join(str(value[name]) for name in ("dataset", "split") if value.get(name))


def _pair(ends: Any) -> tuple[float, float] | None:
    return (ends[0], ends[1]) if ends and None not in ends else None
