"""Products of a stored matrix with vectors in float32, along its rows or down its columns, by one thread.

Both read four streams at a time, far from each other: measured on one core, one stream gives 9 to 14 GB/s, four
neighbouring rows 8, four distant ones 20 to 25.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from microglia.execution.cpu.memory import FAST, bf16, f16, f32, put_f32, whole

ZERO = np.float32(0)


class Matrix(NamedTuple):
    """Stored rows of `length` numbers each, `step` bytes apart from the address `base` on.

    scales: address of the float32 that groups of GROUP numbers are multiplied by, row after row, where there are any.
    """

    base: int
    step: int
    length: int
    scales: int


class Vectors(NamedTuple):
    """`count` vectors to multiply, `step` bytes apart from the address x on, and where their results belong."""

    x: int
    step: int
    count: int
    out: int
    out_step: int


def rows_of(load: Any) -> Any:
    """The product along rows of numbers that `load` reads."""

    @njit(**FAST)
    def four(a: int, b: int, c: int, d: int, length: int, x: int, out: int, apart: int) -> None:
        """The rows at a, b, c and d times one vector, to places `apart` numbers from each other."""
        s, t, u, v = ZERO, ZERO, ZERO, ZERO
        for j in range(length):
            value = f32(x, j)
            s += load(a, j) * value
            t += load(b, j) * value
            u += load(c, j) * value
            v += load(d, j) * value
        put_f32(out, 0, s)
        put_f32(out, apart, t)
        put_f32(out, 2 * apart, u)
        put_f32(out, 3 * apart, v)

    @njit(**FAST)
    def two(a: int, b: int, length: int, x: int, step: int, out: int, out_step: int, apart: int) -> None:
        """The rows at a and b times four vectors."""
        s, t, u, v = ZERO, ZERO, ZERO, ZERO
        k, m, n, p = ZERO, ZERO, ZERO, ZERO
        for j in range(length):
            one, other = load(a, j), load(b, j)
            w, y, z, q = f32(x, j), f32(x + step, j), f32(x + 2 * step, j), f32(x + 3 * step, j)
            s += one * w
            t += one * y
            u += one * z
            v += one * q
            k += other * w
            m += other * y
            n += other * z
            p += other * q
        put_f32(out, 0, s)
        put_f32(out + out_step, 0, t)
        put_f32(out + 2 * out_step, 0, u)
        put_f32(out + 3 * out_step, 0, v)
        put_f32(out, apart, k)
        put_f32(out + out_step, apart, m)
        put_f32(out + 2 * out_step, apart, n)
        put_f32(out + 3 * out_step, apart, p)

    @njit(**FAST)
    def rows(matrix: Matrix, vectors: Vectors, first: int, last: int) -> None:
        """The outputs first … last of every vector: each is the sum along its row."""
        quarter, far = (last - first) // 4, (last - first) // 4 * matrix.step
        for r in range(first, first + quarter):
            a = matrix.base + r * matrix.step
            done = 0
            while done + 4 <= vectors.count:
                x, out = vectors.x + done * vectors.step, vectors.out + done * vectors.out_step + 4 * r
                two(a, a + far, matrix.length, x, vectors.step, out, vectors.out_step, quarter)
                out += 8 * quarter
                two(a + 2 * far, a + 3 * far, matrix.length, x, vectors.step, out, vectors.out_step, quarter)
                done += 4
            while done < vectors.count:
                x, out = vectors.x + done * vectors.step, vectors.out + done * vectors.out_step + 4 * r
                four(a, a + far, a + 2 * far, a + 3 * far, matrix.length, x, out, quarter)
                done += 1
        for r in range(first + 4 * quarter, last):
            for i in range(vectors.count):
                s = ZERO
                for j in range(matrix.length):
                    s += load(matrix.base + r * matrix.step, j) * f32(vectors.x + i * vectors.step, j)
                put_f32(vectors.out + i * vectors.out_step, r, s)

    return rows


def columns_of(load: Any) -> Any:
    """The product down columns of numbers that `load` reads."""

    @njit(**FAST)
    def columns(matrix: Matrix, vectors: Vectors, inputs: int, count: int, first: int, last: int) -> None:
        """Add what `count` inputs, by the list at `inputs`, give to the outputs first … last of every vector."""
        base, step, quarter = matrix.base, matrix.step, count // 4
        for k in range(quarter):
            h, i = whole(inputs, k), whole(inputs, k + quarter)
            m, n = whole(inputs, k + 2 * quarter), whole(inputs, k + 3 * quarter)
            a, b, c, d = base + h * step, base + i * step, base + m * step, base + n * step
            for row in range(vectors.count):
                x, out = vectors.x + row * vectors.step, vectors.out + row * vectors.out_step
                s, t, u, v = f32(x, h), f32(x, i), f32(x, m), f32(x, n)
                for j in range(first, last):
                    given = (s * load(a, j) + t * load(b, j)) + (u * load(c, j) + v * load(d, j))
                    put_f32(out, j, f32(out, j) + given)
        for k in range(4 * quarter, count):
            h = whole(inputs, k)
            for row in range(vectors.count):
                out, s = vectors.out + row * vectors.out_step, f32(vectors.x + row * vectors.step, h)
                for j in range(first, last):
                    put_f32(out, j, f32(out, j) + s * load(base + h * step, j))

    return columns


rows_f32, rows_bf16, rows_f16 = rows_of(f32), rows_of(bf16), rows_of(f16)
columns_f32, columns_bf16, columns_f16 = columns_of(f32), columns_of(bf16), columns_of(f16)
