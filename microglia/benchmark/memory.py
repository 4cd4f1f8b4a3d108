"""Bytes: what a decode step reads, what the key/value cache holds, and the most that a process or a device held."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microglia.benchmark.pattern import is_shared, kept_counts, kept_shares
from microglia.sites import Site
from microglia.sites.layouts import plain

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tensor_bytes(tensor: Any) -> int:
    """Bytes that a tensor stores; of a quantised one, of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(lm: Any, *, rows: int = 1) -> int:
    """Bytes of weights that one decode step of `rows` rows reads: all, but of an untied embedding one line a row."""
    parameters: dict[int, Tensor] = {id(p): p for p in lm.parameters()}
    table = lm.get_input_embeddings().weight
    head = lm.get_output_embeddings()
    total = sum(tensor_bytes(p) for p in parameters.values())
    if head is not None and head.weight is table:
        return total
    return total - tensor_bytes(table) + rows * tensor_bytes(table) // len(table)


def kept_weight_bytes(lm: Any, sites: Sequence[Site], keep: Sequence[Tensor], *, rows: int = 1) -> int:
    """The same after compaction to `keep` (B, H): rows that decide for themselves still read every weight."""
    total = weight_bytes(lm, rows=rows)
    if not is_shared(keep):
        return total
    for site, k in zip(sites, keep, strict=True):
        for projection, kept, whole, of_inputs in kept_shares(site, k):
            inner: Any = plain(projection)
            total -= _cut_bytes(inner.weight, kept, whole)
            if inner.bias is not None and not of_inputs:
                total -= _cut_bytes(inner.bias, kept, whole)
    return total


def _cut_bytes(tensor: Tensor, kept: int, whole: int) -> int:
    return tensor_bytes(tensor) * (whole - kept) // whole


def kept_kv_bytes(cache: Any, sites: Sequence[Site], keep: Sequence[Tensor]) -> int:
    """Bytes that a dense cache is left with after compaction to `keep` (B, H)."""
    total = 0
    for site, k in zip(sites, keep, strict=True):
        layer = cache.layers[site.layer]
        held = tensor_bytes(layer.keys) + tensor_bytes(layer.values)
        total += held * kept_counts(site, k)[1] // site.geometry.kv_heads
    return total


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and _CLEAR.exists():
        _CLEAR.write_text("5")  # Linux: sets the high-water mark of the resident set back to what is resident


def peak_bytes(device: torch.device) -> int | None:
    """Most memory held since `reset_peak`: a GPU's tensors, or the whole process on Linux; else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and _STATUS.exists() and _CLEAR.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return None
