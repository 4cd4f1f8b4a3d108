"""Export: the frozen model in one of three formats, with a record of what was frozen and what is lost."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia import __version__
from microglia.checkpoint import CONFIG, check_writable, write_atomically
from microglia.errors import CheckpointError, ConfigError, check_choice, first_line
from microglia.export.frozen import frozen, merged
from microglia.export.plan import KeepPlan
from microglia.export.to_gguf import write_gguf
from microglia.export.to_hf import write_hf
from microglia.export.to_onnx import write_onnx
from microglia.recovery import Recovery
from microglia.results import ExportResult

WRITERS = {"hf": write_hf, "onnx": write_onnx, "gguf": write_gguf}
FORMATS = tuple(WRITERS)
RECORD = "microglia_export.json"
UNFINISHED = ".unfinished"  # where an export is written before it takes the place of an earlier one
LOST = {
    "all": (
        "every prompt is answered with the same heads: nothing is decided from the input, and no keep ratio can be set",
        "the prompt is read with the kept heads as well, not with every head; agents were not trained for that",
    ),
    "hf": ("it loads with trust_remote_code only: stock classes have one head count for all layers",),
    "onnx": ("no training: the graph is fixed, in float32",),
    "gguf": ("no training: llama.cpp reads it as architecture deci",),
}


@dataclass(frozen=True)
class Exported:
    """A written export. Sizes are parameters and bytes of weights; `difference` is the largest one found by reading
    the export back (logits, for onnx to those in float64; tensors for gguf), None when that was not asked for.
    """

    format: str
    folder: Path
    files: tuple[str, ...]
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    difference: float | None
    lost: tuple[str, ...]

    def result(self, plan: KeepPlan, **about: Any) -> ExportResult:
        """What the verb returns and the folder keeps; `about` are base_model, template and accuracy."""
        figures = {**vars(self), "folder": str(self.folder), **plan.summary(), **about}
        return ExportResult(microglia=__version__, **figures)


def check_format(name: str) -> None:
    """Raise ConfigError for a format that does not exist."""
    check_choice("format", name, FORMATS)


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder with something else in it, CheckpointError for one that cannot be written."""
    new = not folder.exists()
    others = sorted({path.name for path in folder.iterdir()} - {UNFINISHED}) if folder.is_dir() else []
    if CONFIG in others or (others and RECORD not in others):
        raise ConfigError(
            f"{folder} holds {', '.join(others[:3])}, not an earlier export, and would be mixed with it; give an empty "
            "or a new --output-dir"
        )
    check_writable(folder)
    if new:
        folder.rmdir()


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plan: KeepPlan,
    folder: Path | str,
    *,
    format: str = "hf",
    check: bool = True,
    details: Mapping[str, Any] | None = None,
    recovery: Recovery | None = None,
) -> Exported:
    """Write `model` with the heads of `plan` to `folder`; the model itself is not changed.

    An export that fails leaves the folder as it was.

    check: read the export back and compare, which for hf needs memory for a second model. details: more for the record
    (accuracy, base model). recovery: of the pruner, which the written weights then contain. Raises
    UnsupportedModelError, one sentence, for what a format cannot hold.
    """
    check_format(format)
    folder = Path(folder)
    check_folder(folder)
    lm = merged(model)
    dense_parameters, dense_bytes = _size(lm)
    with _unfinished(folder) as written:
        with frozen(lm, plan, recovery) as small:
            difference, lost = WRITERS[format](small, tokenizer, written, check=check)
            parameters, size = _size(small)
        exported = Exported(
            format=format,
            folder=folder,
            files=tuple(sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())),
            parameters=parameters,
            dense_parameters=dense_parameters,
            bytes=size,
            dense_bytes=dense_bytes,
            difference=difference,
            lost=(*LOST["all"], *LOST[format], *lost),
        )
        record = exported.result(plan, **(details or {})).to_json()
        write_atomically(written / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        _clear(folder)
        for name in (
            RECORD,
            *exported.files,
        ):  # the record first: whatever happens then, the next export may replace it
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(written / name, folder / name)
    return exported


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write into; it is gone afterwards, and so is `folder` if it is new and empty.

    Raises CheckpointError, one sentence, when the disk is full.
    """
    new, place = not folder.exists(), folder / UNFINISHED
    try:
        shutil.rmtree(place, ignore_errors=True)  # of an export that was killed
        place.mkdir(parents=True)
        yield place
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written ({first_line(error)}); make room or give another") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if new:
            with suppress(OSError):
                folder.rmdir()


def _clear(folder: Path) -> None:
    """Take away what an earlier export wrote, and nothing else."""
    record = folder / RECORD
    if not record.is_file():
        return
    for path in (folder / name for name in json.loads(record.read_bytes())["files"]):
        if path.parent.resolve().is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)
            if path.parent != folder:
                with suppress(OSError):
                    path.parent.rmdir()
    record.unlink()


def _size(lm: nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, tied ones once."""
    parameters = list(lm.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
