"""Which ways of attention are worth trying at a level, and how long one takes. The fastest is kept, level by level.

What is fastest for the dense step need not be so for a smaller one: fewer heads fill the device differently.
"""

import time
from collections.abc import Callable, Sequence

import torch

from microglia.execution.captured import kernels
from microglia.execution.captured.buckets import Bucket

KINDS = ("stock", "products", "kernel", "auto")
REPEATS = 3


def worth_trying(attention: str, device: torch.device, batch: int, bucket: Bucket) -> tuple[str, ...]:
    """The kinds that `attention` stands for, of a step of so many rows at a level; the likeliest one first.

    Without a GPU, where a tape saves no time, `auto` is the model's own. With one, the model's own gives every row and
    head one block of threads, so with fewer of them than multiprocessors it leaves some idle; and where a group has
    several query heads it copies the group's keys for each of them.
    """
    if attention != "auto":
        return (attention,)
    if device.type != "cuda":
        return ("stock",)
    kinds = ("kernel", "products") if kernels.usable(device) else ("products",)
    enough = batch * bucket.groups >= torch.cuda.get_device_properties(device).multi_processor_count
    return (*kinds, "stock") if enough and bucket.queries == 1 else kinds


def timed(work: Sequence[Callable[[], None]], device: torch.device) -> float:
    """Seconds that `work`, one after the other, takes on the device, without what it takes to launch it."""

    def done() -> None:
        for part in work:
            part()

    done()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(REPEATS):
            done()
        return (time.perf_counter() - began) / REPEATS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        done()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / REPEATS
