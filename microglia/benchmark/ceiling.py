"""The best that a keep pattern could do, how much of it was reached, and when its price is paid back."""

import math


def ceiling(dense_bytes: int, kept_bytes: int) -> float:
    """Best possible dense time ÷ compact time of a decode step, which is bound by the bytes that it reads."""
    return dense_bytes / kept_bytes


def realised_share(ratio: float, best: float) -> float | None:
    """Share of the time that could be saved which was saved, (1 - 1/ratio) ÷ (1 - 1/best). None if nothing could be.

    Above 1 where the dense operations did not reach the memory's speed themselves; below 0 for a slowdown.
    """
    if best <= 1:
        return None
    return (1 - 1 / ratio) / (1 - 1 / best)


def break_even_tokens(overhead_ms: float, dense_ms: float, compact_ms: float) -> int | None:
    """Generated tokens after which deciding and slicing have paid for themselves. None when they never do."""
    saved = dense_ms - compact_ms
    return math.ceil(overhead_ms / saved) if saved > 0 else None
