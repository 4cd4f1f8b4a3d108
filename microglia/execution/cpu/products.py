"""One projection's product, shared among threads: whatever its numbers are stored as, and whatever is left out.

What is left out is a list of runs, (start, length) in units of `size` numbers each: whole heads, blocks of channels or
everything. A projection whose matrix lies in rows shares its outputs among the threads; one that lies in columns shares
its inputs, each thread makes a sum of its own, and whoever reads the result adds them up.
"""

from typing import NamedTuple

from numba import njit

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.memory import FAST, ZERO, call3, call5, f32, put_f32, put_whole, real, stand_alone, whole


class Runs(NamedTuple):
    """So many runs at an address, of units of `size` numbers, `total` units in all."""

    at: int
    number: int
    total: int
    size: int


class Vectors(NamedTuple):
    """So many vectors to multiply, `step` bytes apart from the address x on, and where their results belong."""

    x: int
    step: int
    number: int
    out: int
    out_step: int


class Share(NamedTuple):
    """This thread among all of them, and its own places for a list of inputs and for a job."""

    thread: int
    threads: int
    scratch: int
    job: int


@njit(**FAST)
def bounds(total: int, share: Share) -> tuple[int, int]:
    """The part of `total` things that is this thread's: first … last."""
    return total * share.thread // share.threads, total * (share.thread + 1) // share.threads


@njit(**FAST)
def ordered(job: int, base: int, step: int, length: int, vectors: Vectors) -> int:
    """Write down a job: `vectors` times a matrix without scales. Returns its place."""
    put_whole(job, t.JOB_BASE, base)
    put_whole(job, t.JOB_STEP, step)
    put_whole(job, t.JOB_LENGTH, length)
    put_whole(job, t.JOB_SCALES, 0)
    put_whole(job, t.JOB_X, vectors.x)
    put_whole(job, t.JOB_X_STEP, vectors.step)
    put_whole(job, t.JOB_COUNT, vectors.number)
    put_whole(job, t.JOB_OUT, vectors.out)
    put_whole(job, t.JOB_OUT_STEP, vectors.out_step)
    return job


@njit(**FAST)
def listed(runs: Runs, share: Share) -> int:
    """Write this thread's part of the numbers in the runs to its list; returns how many."""
    stand_alone()
    first, last = bounds(runs.total * runs.size, share)
    seen, count = 0, 0
    for r in range(runs.number):
        start, length = whole(runs.at, 2 * r) * runs.size, whole(runs.at, 2 * r + 1) * runs.size
        for i in range(max(first - seen, 0), min(last - seen, length)):
            put_whole(share.scratch, count, start + i)
            count += 1
        seen += length
    return count


@njit(**FAST)
def chosen(count: int, share: Share, vectors: Vectors, threshold: float) -> int:
    """Leave those in the list whose input is larger than the threshold in some vector; returns how many."""
    stand_alone()
    left = 0
    for k in range(count):
        i = whole(share.scratch, k)
        for row in range(vectors.number):
            if abs(f32(vectors.x + row * vectors.step, i)) > threshold:
                put_whole(share.scratch, left, i)
                left += 1
                break
    return left


@njit(**FAST)
def _job(projection: int, vectors: Vectors, share: Share) -> int:
    base, step, length = whole(projection, t.BASE), whole(projection, t.STEP), whole(projection, t.LENGTH)
    job = ordered(share.job, base, step, length, vectors)
    put_whole(job, t.JOB_SCALES, whole(projection, t.SCALES))
    return job


@njit(**FAST)
def _by_rows(projection: int, vectors: Vectors, outputs: Runs, share: Share) -> None:
    """This thread's share of the outputs, with their bias."""
    stand_alone()
    job, code, bias = _job(projection, vectors, share), whole(projection, t.CODE), whole(projection, t.BIAS)
    first, last = bounds(outputs.total * outputs.size, share)
    seen = 0
    for r in range(outputs.number):
        start, length = whole(outputs.at, 2 * r) * outputs.size, whole(outputs.at, 2 * r + 1) * outputs.size
        a, b = start + max(first - seen, 0), start + min(last - seen, length)
        seen += length
        if a >= b:
            continue
        call3(code, (job, a, b))
        if bias != 0:
            for i in range(vectors.number):
                out = vectors.out + i * vectors.out_step
                for j in range(a, b):
                    put_f32(out, j, f32(out, j) + f32(bias, j))


@njit(**FAST)
def _by_columns(projection: int, vectors: Vectors, inputs: Runs, outputs: Runs, share: Share) -> None:
    """This thread's own sum over its share of the inputs, for all outputs; the first thread's has the bias in it."""
    stand_alone()
    job, code, bias = _job(projection, vectors, share), whole(projection, t.CODE), whole(projection, t.BIAS)
    threshold = real(projection, t.THRESHOLD)
    count = listed(inputs, share)
    if threshold > ZERO:
        count = chosen(count, share, vectors, threshold)
    for r in range(outputs.number):
        first = whole(outputs.at, 2 * r) * outputs.size
        last = first + whole(outputs.at, 2 * r + 1) * outputs.size
        for row in range(vectors.number):
            out = vectors.out + row * vectors.out_step
            for j in range(first, last):
                put_f32(out, j, f32(bias, j) if bias != 0 and share.thread == 0 else ZERO)
        call5(code, (job, share.scratch, count, first, last))


@njit(**FAST)
def product(projection: int, vectors: Vectors, inputs: Runs, outputs: Runs, share: Share, part: int) -> int:
    """This thread's share of a projection; parts are `part` bytes from each other. Returns how many parts there are."""
    stand_alone()
    if whole(projection, t.BY_COLUMNS) == 0:
        _by_rows(projection, vectors, outputs, share)
        return 1
    own = Vectors(vectors.x, vectors.step, vectors.number, vectors.out + share.thread * part, vectors.out_step)
    _by_columns(projection, own, inputs, outputs, share)
    return share.threads


@njit(**FAST)
def summed(at: int, i: int, parts: int, part: int) -> float:
    """Number i of a result, over all its parts."""
    s = f32(at, i)
    for p in range(1, parts):
        s += f32(at + p * part, i)
    return s
