"""How a value moves from its start to its end while training goes on."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, at: start + (end - start) * at,
    "cosine": lambda start, end, at: end + (start - end) * (1 + math.cos(math.pi * at)) / 2,
    "exponential": lambda start, end, at: start if start == end else start * (end / start) ** at,
}


def scheduled(kind: str, ends: tuple[float, float], progress: float) -> float:
    """The value at `progress` (0 at the first step, 1 at the last) between `ends` (start, end)."""
    return SCHEDULES[kind](*ends, min(max(progress, 0.0), 1.0))
