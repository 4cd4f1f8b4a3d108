"""Several processes that work as one (`torchrun`): who takes what, what all of them results, and who may write.

Everything here is a matter of course in a single process, and changes nothing there.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Job = TypeVar("Job")
Result = TypeVar("Result")


def join() -> None:
    """Meet the other processes that torchrun started, each on a device of its own; nothing when there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Until all processes have come here."""
    if count() > 1:
        dist.barrier()


def agreed(find: Callable[[], Result]) -> Result:
    """What the first process finds, in all of them; the others do not look."""
    if count() == 1:
        return find()
    box: list[Any] = [find() if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]


def share(rows: int) -> range:
    """This process's rows of a batch; empty when there are more processes than rows."""
    return range(rank(), rows, count())


def shared_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """The result of every job, in the jobs' order. Each process does its share and hears of the rest."""
    mine = [work(jobs[index]) for index in share(len(jobs))]
    if count() == 1:
        return mine
    results: list[Any] = [None] * count()
    dist.all_gather_object(results, mine)
    return [results[index % count()][index // count()] for index in range(len(jobs))]


def pooled(mean: Tensor, items: int) -> Tensor:
    """The mean over the items of all processes, the same number in each, from this one's mean over its `items`.

    Its gradient is such that the mean of the processes' gradients, which DistributedDataParallel takes, is exact.
    """
    return mean if count() == 1 else _Pooled.apply(mean, items)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, items: int) -> Tensor:
        sums = torch.stack([mean.detach().double() * items, mean.new_tensor(items, dtype=torch.float64)])
        dist.all_reduce(sums)
        ctx.weight = items * count() / float(sums[1])
        return (sums[0] / sums[1]).to(mean.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.weight, None
