"""A measured number together with the circumstances that it was measured in, kept as JSON lines.

A number without its device, versions, commit and command cannot be compared with another one. Whole results of a verb
are in `microglia.results`.
"""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from microglia import store
from microglia.errors import DataError

PACKAGE = Path(__file__).resolve().parent
MEASURED_WITH = ("torch", "transformers")  # the libraries whose version changes what a measurement says


@dataclass(frozen=True)
class Record:
    """One measured number.

    name: what was measured, e.g. `decode_latency`; unit: of value, p20 and p80, e.g. `ms`, `MiB`, `ratio`;
    value: the median, mean or proportion that stands in tables; p20, p80: percentiles of the single measurements, None
    where there are none; n: how many measurements or examples stand behind value; seed: None when nothing was drawn;
    device, versions, commit, command: see `circumstances`; extra: anything else that JSON can hold.
    """

    name: str
    value: float
    unit: str
    p20: float | None = None
    p80: float | None = None
    n: int = 1
    seed: int | None = None
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def circumstances(device: torch.device | str) -> dict[str, Any]:
    """What a measurement on `device` made now depends on, as keyword arguments of `Record`.

    Returns device (name of the CPU with its threads, or of the accelerator), versions (Python, torch, transformers),
    commit (None outside a checkout; `+changed` when the package differs from it) and command (the command line).
    """
    return {
        "device": _device_name(torch.device(device)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in MEASURED_WITH}},
        "commit": _commit(),
        "command": _command(sys.orig_argv),
    }


def append_records(path: Path | str, records: Iterable[Record]) -> None:
    """Append records to a JSON-lines file, all of them or none; see `store.append`, also for what it raises."""
    store.append(path, (asdict(record) for record in records))


def read_records(path: Path | str) -> list[Record]:
    """Every record of a JSON-lines file, in its order; what a crash cut short is left out, see `store.read`.

    Raises DataError when the file is missing, or naming file and line when a line is not a record.
    """
    return [_record(row, where) for where, row in store.read(path)]


def _record(row: dict[str, Any], where: str) -> Record:
    known = {f.name for f in fields(Record)}
    required = {f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - row.keys()):
        raise DataError(f"{where} has no {', '.join(missing)}; a record needs {', '.join(sorted(required))}, so add it")
    if unknown := sorted(row.keys() - known):
        raise DataError(f"{where} has the unknown field {', '.join(unknown)}; put what is not in Record under extra")
    if isinstance(row["value"], bool) or not isinstance(row["value"], int | float):
        raise DataError(f"{where} has the value {row['value']!r}, which is not a number; mend or delete that line")
    return Record(**row)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    if device.type == "cpu":
        return f"{_cpu_model()} (cpu, {torch.get_num_threads()} threads)"
    return f"{platform.processor() or platform.machine()} ({device.type})"


def _cpu_model() -> str:
    """The marketing name where Linux gives one; `platform.processor` is empty or only `x86_64` on most systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str, folder: Path) -> str | None:
    """Output of a git command run in `folder`; None when git is missing, hangs or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit(package: Path = PACKAGE) -> str | None:
    """The commit of the checkout that `package` is tracked in; an install inside somebody else's checkout has none."""
    if _git("ls-files", "--error-unmatch", "__init__.py", folder=package) is None:
        return None
    commit = _git("rev-parse", "--verify", "HEAD", folder=package)
    if commit is None:
        return None
    return f"{commit}+changed" if _git("status", "--porcelain", "--", ".", folder=package) else commit


def _command(argv: list[str]) -> str:
    """The command line without the folders of this machine: `microglia train …`, `python scripts/train.py …`."""
    program, *arguments = argv
    words = [Path(program).name, *arguments]
    if arguments and not arguments[0].startswith("-"):
        script = Path.cwd() / arguments[0]
        if script.parent == Path(sys.executable).parent:
            words = [script.name, *arguments[1:]]
        elif script.is_relative_to(Path.cwd()):
            words[1] = str(script.relative_to(Path.cwd()))
    return shlex.join(words)
