"""The most memory that a process or a device held."""

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
