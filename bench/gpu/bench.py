"""What every cell of the benchmark shares: the device, one model at a time, and the records so far."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu.options import Options
from microglia.anatomy import Anatomy
from microglia.benchmark.latency import Clock
from microglia.benchmark.shapes import SHAPES, random_model, shape_config
from microglia.record import Record, append_records, circumstances

GIB = 2**30
# What makes a shape tiny; its family, and how many query heads share keys and values, stay.
TINY_HEADS = 8
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": TINY_HEADS, "intermediate_size": 256,
    "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass
class Bench:
    """One run: its options and device, every record that is known, and lines to be said again at the end."""

    options: Options
    device: torch.device
    records: list[Record] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    failures: int = 0
    held: tuple[str, Any] | None = None  # the name of the model in memory, and the model

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """Found once: asking for the commit takes as long as many steps."""
        return circumstances(self.device)

    def say(self, line: str) -> None:
        """A line now, and again at the end."""
        print(line, flush=True)
        self.lines.append(line)

    def say_once(self, line: str) -> None:
        """A line that holds for several variants."""
        if line not in self.lines:
            self.say(line)

    # --- records ----------------------------------------------------------------------------------------------------

    def known(self, name: str, **key: Any) -> bool:
        """Whether this was measured already."""
        return any(record.name == name and record.extra.get("key") == key for record in self.records)

    def write(self, name: str, value: float, unit: str, key: dict[str, Any], **extra: Any) -> None:
        """Keep one record, and append it to the file at once."""
        spread = {name: extra.pop(name, None) for name in ("p20", "p80")} | {"n": extra.pop("n", 1)}
        extra = {**key, **extra, "key": key}
        record = Record(name, value, unit, **spread, seed=0, extra=extra, **self.circumstances)
        self.records.append(record)
        if self.options.output is not None:
            append_records(self.options.output, [record])

    def rows(self) -> list[dict[str, Any]]:
        """Every record as JSON has it."""
        return [asdict(record) for record in self.records]

    # --- what fails -------------------------------------------------------------------------------------------------

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part that may fail without taking the others with it; the end of its time goes through."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed(f"{what}: not measured, {reason(error)}")
        self.tidy()

    def failed(self, line: str) -> None:
        """Say what is missing; the cell will be looked at again by the next run."""
        self.failures += 1
        self.say(line)

    def tidy(self) -> None:
        """Give back memory that nobody uses: what an error held on to, and captured steps of parts before."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- models -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # whoever asks: weights made in inference mode could not be trained beside
    def model(self, name: str, folder: Path | None = None) -> Any:
        """The model of a shape, or of a folder, in memory; the one before goes, if it was another."""
        if self.held is None or self.held[0] != name:
            self.held = None
            self.tidy()
            self.held = name, self._shape(name) if folder is None else self._loaded(folder)
        return self.held[1]

    def _shape(self, shape: str) -> Any:
        if not self.options.tiny:
            return random_model(shape, layers=self.options.layers, dtype=self.dtype, device=self.device)
        whole = SHAPES[shape]
        groups = max(1, TINY_HEADS * whole["num_key_value_heads"] // whole["num_attention_heads"])
        with TemporaryDirectory() as folder:
            AutoConfig.for_model(**whole | TINY | {"num_key_value_heads": groups}).save_pretrained(folder)
            return random_model(folder, dtype=self.dtype, device=self.device)

    def _loaded(self, folder: Path) -> Any:
        if not any(folder.glob("*.safetensors")):
            return random_model(str(folder), layers=self.options.layers, dtype=self.dtype, device=self.device)
        config = shape_config(str(folder), self.options.layers)
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=self.dtype, local_files_only=True)
        return lm.to(self.device).requires_grad_(False).eval()

    def tokens(self, lm: Any, batch: int, length: int) -> Tensor:
        """Random prompts (batch, length) on the device; the library's own generate wants tensors that it may change."""
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(0)
            return torch.randint(Anatomy(lm).vocab_size, (batch, length), generator=generator).to(self.device)

    # --- the device -------------------------------------------------------------------------------------------------

    def bandwidth(self) -> float:
        """GB/s at which the device reads: the best of ten sums over a tensor that no cache holds; measured once."""
        found = [record.value for record in self.records if record.name == "gpu_bandwidth"]
        if not found:
            size = 4 * GIB if self.device.type == "cuda" else 2**24
            x, clock = torch.ones(size // 4, device=self.device), Clock(self.device)
            found = [size / min(clock(lambda: x.sum()) for _ in range(11)) / 1e6]
            self.write("gpu_bandwidth", found[0], "GB/s", {})
        return found[-1]


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
