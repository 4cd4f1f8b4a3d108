"""The products of `streams` over weights in 8 or 4 bits, in groups of GROUP with a float32 scale each.

Four bits: byte k of a group holds number k in its low half and number k + 16 in its high half, each plus 8.
"""

from typing import Any

import numpy as np
from numba import njit

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.memory import FAST, f32, high4, i8, low4, put_f32, whole

GROUP = 32
HALF_GROUP = GROUP // 2
ZERO, EIGHT = np.float32(0), np.float32(8)


@njit(**FAST)
def _dot8(row: int, scale: float, x: int, group: int) -> float:
    s, first = ZERO, group * GROUP
    for j in range(GROUP):
        s += i8(row + first, j) * f32(x + 4 * first, j)
    return s * scale


@njit(**FAST)
def _dot4(row: int, scale: float, x: int, group: int) -> float:
    s, first = ZERO, group * GROUP
    for j in range(HALF_GROUP):
        s += (low4(row + first // 2, j) - EIGHT) * f32(x + 4 * first, j)
        s += (high4(row + first // 2, j) - EIGHT) * f32(x + 4 * first + 4 * HALF_GROUP, j)
    return s * scale


@njit(**FAST)
def _add8(row: int, factor: float, out: int, group: int) -> None:
    first = group * GROUP
    for j in range(GROUP):
        put_f32(out + 4 * first, j, f32(out + 4 * first, j) + factor * i8(row + first, j))


@njit(**FAST)
def _add4(row: int, factor: float, out: int, group: int) -> None:
    low = out + 4 * group * GROUP
    high, byte = low + 4 * HALF_GROUP, row + group * HALF_GROUP
    for j in range(HALF_GROUP):
        put_f32(low, j, f32(low, j) + factor * (low4(byte, j) - EIGHT))
    for j in range(HALF_GROUP):
        put_f32(high, j, f32(high, j) + factor * (high4(byte, j) - EIGHT))


def rows_of(dot: Any) -> Any:
    """The product along packed rows, by the product of one group."""

    @njit(**FAST)
    def four(job: int, row: int, apart: int, x: int, out: int) -> None:
        """Four rows, `apart` from each other, times one vector."""
        groups, step = whole(job, t.JOB_LENGTH) // GROUP, whole(job, t.JOB_STEP)
        a, scales = whole(job, t.JOB_BASE) + row * step, whole(job, t.JOB_SCALES) + 4 * row * groups
        far, scales_far = apart * step, 4 * apart * groups
        s, e, u, v = ZERO, ZERO, ZERO, ZERO
        for g in range(groups):
            s += dot(a, f32(scales, g), x, g)
            e += dot(a + far, f32(scales + scales_far, g), x, g)
            u += dot(a + 2 * far, f32(scales + 2 * scales_far, g), x, g)
            v += dot(a + 3 * far, f32(scales + 3 * scales_far, g), x, g)
        put_f32(out, row, s)
        put_f32(out, row + apart, e)
        put_f32(out, row + 2 * apart, u)
        put_f32(out, row + 3 * apart, v)

    @njit(**FAST)
    def rows(job: int, first: int, last: int) -> None:
        """The outputs first … last of every vector of a job."""
        quarter, vectors = (last - first) // 4, whole(job, t.JOB_COUNT)
        x, x_step = whole(job, t.JOB_X), whole(job, t.JOB_X_STEP)
        out, out_step = whole(job, t.JOB_OUT), whole(job, t.JOB_OUT_STEP)
        for r in range(first, first + quarter):
            for i in range(vectors):
                four(job, r, quarter, x + i * x_step, out + i * out_step)
        for r in range(first + 4 * quarter, last):
            for i in range(vectors):
                four(job, r, 0, x + i * x_step, out + i * out_step)

    return rows


def columns_of(add: Any) -> Any:
    """The product down packed columns, by adding one group; outputs come in whole groups."""

    @njit(**FAST)
    def columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        """Add what `count` inputs, by the list at `inputs`, give to the outputs first … last of every vector."""
        groups, quarter = whole(job, t.JOB_LENGTH) // GROUP, max(1, count // 4)
        for k in range(quarter):
            for place in range(k, count, quarter):
                i = whole(inputs, place)
                row, scales = whole(job, t.JOB_BASE) + i * whole(job, t.JOB_STEP), whole(job, t.JOB_SCALES)
                for vector in range(whole(job, t.JOB_COUNT)):
                    x = f32(whole(job, t.JOB_X) + vector * whole(job, t.JOB_X_STEP), i)
                    out = whole(job, t.JOB_OUT) + vector * whole(job, t.JOB_OUT_STEP)
                    for g in range(first // GROUP, last // GROUP):
                        add(row, x * f32(scales, i * groups + g), out, g)

    return columns


rows_int8, rows_int4 = rows_of(_dot8), rows_of(_dot4)
columns_int8, columns_int4 = columns_of(_add8), columns_of(_add4)
