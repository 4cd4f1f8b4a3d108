"""One projection's product, shared among threads: whatever its numbers are stored as, and whatever is left out.

What is left out is a list of runs, (start, length) in units of `size` numbers each: whole heads, blocks of channels or
everything. A projection whose matrix lies in rows shares its outputs among the threads; one that lies in columns shares
its inputs, each thread makes a sum of its own, and whoever reads the result adds them up.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from microglia.execution.cpu.memory import FAST, f32, put_f32, put_whole, real, whole
from microglia.execution.cpu.packed import columns_int4, columns_int8, rows_int4, rows_int8
from microglia.execution.cpu.streams import (
    Matrix,
    Vectors,
    columns_bf16,
    columns_f16,
    columns_f32,
    rows_bf16,
    rows_f16,
    rows_f32,
)
from microglia.execution.cpu.tables import BASE, BF16, BY_COLUMNS, BIAS, F16, F32, INT8, KIND, LENGTH, SCALES, STEP, THRESHOLD

ZERO = np.float32(0)


class Runs(NamedTuple):
    """`count` runs at an address, of units of `size` numbers, `total` units in all."""

    at: int
    count: int
    total: int
    size: int


class Share(NamedTuple):
    """This thread among all of them, and the place of a list of inputs that is its own."""

    thread: int
    threads: int
    scratch: int


@njit(**FAST)
def bounds(total: int, share: Share) -> tuple[int, int]:
    """The part of `total` things that is this thread's: first … last."""
    return total * share.thread // share.threads, total * (share.thread + 1) // share.threads


@njit(**FAST)
def rows(kind: int, matrix: Matrix, vectors: Vectors, first: int, last: int) -> None:
    """The outputs first … last of every vector, for a matrix in rows."""
    if kind == BF16:
        rows_bf16(matrix, vectors, first, last)
    elif kind == F32:
        rows_f32(matrix, vectors, first, last)
    elif kind == F16:
        rows_f16(matrix, vectors, first, last)
    elif kind == INT8:
        rows_int8(matrix, vectors, first, last)
    else:
        rows_int4(matrix, vectors, first, last)


@njit(**FAST)
def columns(kind: int, matrix: Matrix, vectors: Vectors, inputs: int, count: int, span: tuple[int, int]) -> None:
    """Add what the listed inputs give to a span of outputs of every vector, for a matrix in columns."""
    first, last = span
    if kind == BF16:
        columns_bf16(matrix, vectors, inputs, count, first, last)
    elif kind == F32:
        columns_f32(matrix, vectors, inputs, count, first, last)
    elif kind == F16:
        columns_f16(matrix, vectors, inputs, count, first, last)
    elif kind == INT8:
        columns_int8(matrix, vectors, inputs, count, first, last)
    else:
        columns_int4(matrix, vectors, inputs, count, first, last)


@njit(**FAST)
def listed(runs: Runs, share: Share) -> int:
    """Write this thread's part of the numbers in the runs to its list; returns how many."""
    first, last = bounds(runs.total * runs.size, share)
    seen, count = 0, 0
    for r in range(runs.count):
        start, length = whole(runs.at, 2 * r) * runs.size, whole(runs.at, 2 * r + 1) * runs.size
        for i in range(max(first - seen, 0), min(last - seen, length)):
            put_whole(share.scratch, count, start + i)
            count += 1
        seen += length
    return count


@njit(**FAST)
def chosen(count: int, share: Share, vectors: Vectors, threshold: float) -> int:
    """Leave those in the list whose input is larger than the threshold in some vector; returns how many."""
    left = 0
    for k in range(count):
        i = whole(share.scratch, k)
        for row in range(vectors.count):
            if abs(f32(vectors.x + row * vectors.step, i)) > threshold:
                put_whole(share.scratch, left, i)
                left += 1
                break
    return left


@njit(**FAST)
def _matrix(projection: int) -> Matrix:
    return Matrix(
        whole(projection, BASE), whole(projection, STEP), whole(projection, LENGTH), whole(projection, SCALES)
    )


@njit(**FAST)
def _by_rows(projection: int, vectors: Vectors, outputs: Runs, share: Share) -> None:
    """This thread's share of the outputs, with their bias."""
    matrix, kind, bias = _matrix(projection), whole(projection, KIND), whole(projection, BIAS)
    first, last = bounds(outputs.total * outputs.size, share)
    seen = 0
    for r in range(outputs.count):
        start, length = whole(outputs.at, 2 * r) * outputs.size, whole(outputs.at, 2 * r + 1) * outputs.size
        a, b = start + max(first - seen, 0), start + min(last - seen, length)
        seen += length
        if a >= b:
            continue
        rows(kind, matrix, vectors, a, b)
        if bias != 0:
            for i in range(vectors.count):
                out = vectors.out + i * vectors.out_step
                for j in range(a, b):
                    put_f32(out, j, f32(out, j) + f32(bias, j))


@njit(**FAST)
def _by_columns(projection: int, vectors: Vectors, inputs: Runs, outputs: Runs, share: Share) -> None:
    """This thread's own sum over its share of the inputs, for all outputs; the first thread's has the bias in it."""
    matrix, kind, bias = _matrix(projection), whole(projection, KIND), whole(projection, BIAS)
    threshold = real(projection, THRESHOLD)
    count = listed(inputs, share)
    if threshold > ZERO:
        count = chosen(count, share, vectors, threshold)
    for r in range(outputs.count):
        first = whole(outputs.at, 2 * r) * outputs.size
        last = first + whole(outputs.at, 2 * r + 1) * outputs.size
        for row in range(vectors.count):
            out = vectors.out + row * vectors.out_step
            for j in range(first, last):
                put_f32(out, j, f32(bias, j) if bias != 0 and share.thread == 0 else ZERO)
        columns(kind, matrix, vectors, share.scratch, count, (first, last))


@njit(**FAST)
def product(projection: int, vectors: Vectors, inputs: Runs, outputs: Runs, share: Share, part: int) -> int:
    """This thread's share of a projection; parts are `part` bytes from each other. Returns how many parts there are."""
    if whole(projection, BY_COLUMNS) == 0:
        _by_rows(projection, vectors, outputs, share)
        return 1
    own = Vectors(vectors.x, vectors.step, vectors.count, vectors.out + share.thread * part, vectors.out_step)
    _by_columns(projection, own, inputs, outputs, share)
    return share.threads


@njit(**FAST)
def summed(at: int, i: int, parts: int, part: int) -> float:
    """Number i of a result, over all its parts."""
    s = f32(at, i)
    for p in range(1, parts):
        s += f32(at + p * part, i)
    return s
