"""The products of `streams` over weights in 8 or 4 bits, in groups of GROUP with a float32 scale each.

Four bits: byte k of a group holds number k in its low half and number k + 16 in its high half, each plus 8.
"""

from typing import Any

import numpy as np
from numba import njit

from microglia.execution.cpu.memory import FAST, f32, high4, i8, low4, put_f32, whole
from microglia.execution.cpu.streams import Matrix, Vectors

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
    def one(matrix: Matrix, x: int, row: int) -> float:
        groups, s = matrix.length // GROUP, ZERO
        for g in range(groups):
            s += dot(matrix.base + row * matrix.step, f32(matrix.scales, row * groups + g), x, g)
        return s

    @njit(**FAST)
    def four(matrix: Matrix, x: int, row: int, out: int, apart: int) -> None:
        groups = matrix.length // GROUP
        a, scale_a = matrix.base + row * matrix.step, matrix.scales + 4 * row * groups
        far, scale_far = apart * matrix.step, 4 * apart * groups
        s, t, u, v = ZERO, ZERO, ZERO, ZERO
        for g in range(groups):
            s += dot(a, f32(scale_a, g), x, g)
            t += dot(a + far, f32(scale_a + scale_far, g), x, g)
            u += dot(a + 2 * far, f32(scale_a + 2 * scale_far, g), x, g)
            v += dot(a + 3 * far, f32(scale_a + 3 * scale_far, g), x, g)
        put_f32(out, row, s)
        put_f32(out, row + apart, t)
        put_f32(out, row + 2 * apart, u)
        put_f32(out, row + 3 * apart, v)

    @njit(**FAST)
    def rows(matrix: Matrix, vectors: Vectors, first: int, last: int) -> None:
        """The outputs first … last of every vector."""
        quarter = (last - first) // 4
        for r in range(first, first + quarter):
            for i in range(vectors.count):
                four(matrix, vectors.x + i * vectors.step, r, vectors.out + i * vectors.out_step, quarter)
        for r in range(first + 4 * quarter, last):
            for i in range(vectors.count):
                put_f32(vectors.out + i * vectors.out_step, r, one(matrix, vectors.x + i * vectors.step, r))

    return rows


def columns_of(add: Any) -> Any:
    """The product down packed columns, by adding one group; outputs come in whole groups."""

    @njit(**FAST)
    def columns(matrix: Matrix, vectors: Vectors, inputs: int, count: int, first: int, last: int) -> None:
        """Add what `count` inputs, by the list at `inputs`, give to the outputs first … last of every vector."""
        groups, quarter = matrix.length // GROUP, max(1, count // 4)
        for k in range(quarter):
            for place in range(k, count, quarter):
                i = whole(inputs, place)
                for row in range(vectors.count):
                    x, out = f32(vectors.x + row * vectors.step, i), vectors.out + row * vectors.out_step
                    for g in range(first // GROUP, last // GROUP):
                        add(matrix.base + i * matrix.step, x * f32(matrix.scales, i * groups + g), out, g)

    return columns


rows_int8, rows_int4 = rows_of(_dot8), rows_of(_dot4)
columns_int8, columns_int4 = columns_of(_add8), columns_of(_add4)
