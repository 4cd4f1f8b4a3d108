"""Export: the frozen model in one of three formats, with a record of what was frozen and what is lost."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia import __version__
from microglia.checkpoint import CONFIG, check_writable, write_atomically
from microglia.errors import ConfigError
from microglia.export.frozen import frozen, merged
from microglia.export.plan import KeepPlan
from microglia.export.to_gguf import write_gguf
from microglia.export.to_hf import write_hf
from microglia.export.to_onnx import write_onnx
from microglia.results import ExportResult

WRITERS = {"hf": write_hf, "onnx": write_onnx, "gguf": write_gguf}
FORMATS = tuple(WRITERS)
RECORD = "microglia_export.json"
LOST = {
    "all": (
        "every prompt is answered with the same heads: nothing is decided from the input, and there is no dial",
        "the prompt is read with the kept heads as well, not with every head; agents were not trained for that",
    ),
    "hf": ("it loads with trust_remote_code only: stock classes have one head count for all layers",),
    "onnx": ("no training: the graph is fixed, in float32",),
    "gguf": ("no training: llama.cpp reads it as architecture deci",),
}


@dataclass(frozen=True)
class Exported:
    """A written export. Sizes are parameters and bytes of weights; `difference` is the largest one found by reading
    the export back (logits; tensors for gguf), None when that was not asked for.
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
    if name not in FORMATS:
        raise ConfigError(f"format={name!r} is unknown; choose one of {', '.join(FORMATS)}")


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder with something else in it, CheckpointError for one that cannot be written."""
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if CONFIG in others or (others and RECORD not in others):
        raise ConfigError(
            f"{folder} holds {', '.join(others[:3])}, not an earlier export, and would be mixed with it; give an empty "
            "or a new --output-dir"
        )
    check_writable(folder)


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plan: KeepPlan,
    folder: Path | str,
    *,
    format: str = "hf",
    check: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write `model` with the heads of `plan` to `folder`; the model itself is not changed.

    check: read the export back and compare, which for hf needs room for a second model. about: more for the record
    (accuracy, base model). Raises UnsupportedModelError, one sentence, for what a format cannot hold.
    """
    check_format(format)
    folder = Path(folder)
    check_folder(folder)
    lm = merged(model)
    dense = _size(lm)
    _clear(folder)
    before = _files(folder)
    with frozen(lm, plan) as small:
        found = WRITERS[format](small, tokenizer, folder, check=check)
        size = _size(small)
    exported = Exported(
        format=format,
        folder=folder,
        files=tuple(sorted(_files(folder) - before)),
        parameters=size[0],
        dense_parameters=dense[0],
        bytes=size[1],
        dense_bytes=dense[1],
        difference=found["difference"],
        lost=(*LOST["all"], *LOST[format], *found["lost"]),
    )
    record = exported.result(plan, **(about or {})).to_json()
    write_atomically(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
    return exported


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _clear(folder: Path) -> None:
    """Take away what an earlier export wrote, and nothing else."""
    if (folder / RECORD).is_file():
        for name in json.loads((folder / RECORD).read_bytes())["files"]:
            (folder / Path(name).name).unlink(missing_ok=True)
        (folder / RECORD).unlink()


def _size(lm: nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, tied ones once."""
    parameters = list(lm.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
