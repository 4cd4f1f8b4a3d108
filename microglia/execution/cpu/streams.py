"""Products of a stored matrix with vectors in float32, along its rows or down its columns, by one thread.

Both read four streams at a time, far from each other: measured on one core, one stream gives 9 to 14 GB/s, four
neighbouring rows 8, four distant ones 20 to 25.
"""

from typing import Any

from numba import njit

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.memory import FAST, ZERO, bf16, f16, f32, fetch, i8, put_f32, whole

# Where inputs are left out, rows do not follow each other and no core guesses which one comes next: it is told so many
# rows ahead, BLOCK numbers at a time (a fifth faster at half of the inputs; told of everything at once, slower).
AHEAD, BLOCK = 2, 128


def _several(load: Any) -> tuple[Any, Any]:
    """Four rows times one vector, and two rows times four, of numbers that `load` reads."""

    @njit(**FAST)
    def four(a: int, b: int, c: int, d: int, length: int, x: int, out: int, apart: int) -> None:
        """The rows at a, b, c and d times one vector, to places `apart` numbers from each other."""
        s, e, u, v = ZERO, ZERO, ZERO, ZERO
        for j in range(length):
            value = f32(x, j)
            s += load(a, j) * value
            e += load(b, j) * value
            u += load(c, j) * value
            v += load(d, j) * value
        put_f32(out, 0, s)
        put_f32(out, apart, e)
        put_f32(out, 2 * apart, u)
        put_f32(out, 3 * apart, v)

    @njit(**FAST)
    def two(a: int, b: int, length: int, x: int, step: int, out: int, out_step: int, apart: int) -> None:
        """The rows at a and b times four vectors."""
        s, e, u, v = ZERO, ZERO, ZERO, ZERO
        k, m, n, p = ZERO, ZERO, ZERO, ZERO
        for j in range(length):
            one, other = load(a, j), load(b, j)
            w, y, z, q = f32(x, j), f32(x + step, j), f32(x + 2 * step, j), f32(x + 3 * step, j)
            s += one * w
            e += one * y
            u += one * z
            v += one * q
            k += other * w
            m += other * y
            n += other * z
            p += other * q
        put_f32(out, 0, s)
        put_f32(out + out_step, 0, e)
        put_f32(out + 2 * out_step, 0, u)
        put_f32(out + 3 * out_step, 0, v)
        put_f32(out, apart, k)
        put_f32(out + out_step, apart, m)
        put_f32(out + 2 * out_step, apart, n)
        put_f32(out + 3 * out_step, apart, p)

    return four, two


def rows_of(load: Any, scaled: bool = False) -> Any:
    """The product along rows of numbers that `load` reads. scaled: every row has a scale."""
    four, two = _several(load)

    @njit(**FAST)
    def rows(job: int, first: int, last: int) -> None:
        """The outputs first … last of every vector of a job: each is the sum along its row."""
        base, step, length = whole(job, t.JOB_BASE), whole(job, t.JOB_STEP), whole(job, t.JOB_LENGTH)
        x_step, out_step = whole(job, t.JOB_X_STEP), whole(job, t.JOB_OUT_STEP)
        quarter, far = (last - first) // 4, (last - first) // 4 * step
        for r in range(first, first + quarter):
            a, done = base + r * step, 0
            x, out = whole(job, t.JOB_X), whole(job, t.JOB_OUT) + 4 * r
            while done + 4 <= whole(job, t.JOB_COUNT):
                two(a, a + far, length, x, x_step, out, out_step, quarter)
                two(a + 2 * far, a + 3 * far, length, x, x_step, out + 8 * quarter, out_step, quarter)
                done, x, out = done + 4, x + 4 * x_step, out + 4 * out_step
            while done < whole(job, t.JOB_COUNT):
                four(a, a + far, a + 2 * far, a + 3 * far, length, x, out, quarter)
                done, x, out = done + 1, x + x_step, out + out_step
        for r in range(first + 4 * quarter, last):
            for i in range(whole(job, t.JOB_COUNT)):
                s = ZERO
                for j in range(length):
                    s += load(base + r * step, j) * f32(whole(job, t.JOB_X) + i * x_step, j)
                put_f32(whole(job, t.JOB_OUT) + i * out_step, r, s)
        if scaled:
            for i in range(whole(job, t.JOB_COUNT)):
                out = whole(job, t.JOB_OUT) + i * out_step
                for r in range(first, last):
                    put_f32(out, r, f32(out, r) * f32(whole(job, t.JOB_SCALES), r))

    return rows


def columns_of(load: Any, size: int, scaled: bool = False) -> Any:
    """The product down columns of numbers of `size` bytes that `load` reads. scaled: every input has a scale."""

    @njit(**FAST)
    def factor(job: int, x: int, i: int) -> float:
        return f32(x, i) * f32(whole(job, t.JOB_SCALES), i) if scaled else f32(x, i)

    @njit(**FAST)
    def four(a: int, b: int, c: int, d: int, factors: tuple[float, ...], out: int, first: int, last: int) -> None:
        s, e, u, v = factors
        for j in range(first, last):
            put_f32(out, j, f32(out, j) + (s * load(a, j) + e * load(b, j)) + (u * load(c, j) + v * load(d, j)))

    @njit(**FAST)
    def coming(job: int, inputs: int, k: int, quarter: int, first: int, last: int) -> None:
        """Ask for a part of the rows that come after the next."""
        for stream in range(4):
            row = whole(inputs, min(k + AHEAD, quarter - 1) + stream * quarter)
            start = whole(job, t.JOB_BASE) + row * whole(job, t.JOB_STEP)
            for at in range(start + size * first, start + size * last, 64):
                fetch(at)

    @njit(**FAST)
    def columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        """Add what `count` inputs, by the list at `inputs`, give to the outputs first … last of every vector."""
        base, step, quarter = whole(job, t.JOB_BASE), whole(job, t.JOB_STEP), count // 4
        vectors, x_step, out_step = whole(job, t.JOB_COUNT), whole(job, t.JOB_X_STEP), whole(job, t.JOB_OUT_STEP)
        gaps = count > 0 and whole(inputs, count - 1) - whole(inputs, 0) >= count
        block = BLOCK if gaps else last - first
        for k in range(quarter):
            h, i = whole(inputs, k), whole(inputs, k + quarter)
            m, n = whole(inputs, k + 2 * quarter), whole(inputs, k + 3 * quarter)
            for at in range(first, last, block):
                end = min(at + block, last)
                if gaps:
                    coming(job, inputs, k, quarter, at, end)
                for row in range(vectors):
                    x, out = whole(job, t.JOB_X) + row * x_step, whole(job, t.JOB_OUT) + row * out_step
                    factors = factor(job, x, h), factor(job, x, i), factor(job, x, m), factor(job, x, n)
                    four(base + h * step, base + i * step, base + m * step, base + n * step, factors, out, at, end)
        for k in range(4 * quarter, count):
            h = whole(inputs, k)
            for row in range(vectors):
                out = whole(job, t.JOB_OUT) + row * out_step
                s = factor(job, whole(job, t.JOB_X) + row * x_step, h)
                for j in range(first, last):
                    put_f32(out, j, f32(out, j) + s * load(base + h * step, j))

    return columns


rows_f32, rows_bf16, rows_f16 = rows_of(f32), rows_of(bf16), rows_of(f16)
rows_int8, columns_int8 = rows_of(i8, scaled=True), columns_of(i8, 1, scaled=True)
columns_f32, columns_bf16, columns_f16 = columns_of(f32, 4), columns_of(bf16, 2), columns_of(f16, 2)
