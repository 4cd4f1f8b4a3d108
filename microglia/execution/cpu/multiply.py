"""The products of every kind of storage, each compiled for itself and called by its address.

So a model compiles what it needs and no more, and the step none of it.
"""

from collections.abc import Callable
from typing import Any

from numba import cfunc

from microglia.execution.cpu.memory import MATHS
from microglia.execution.cpu.packed import columns_int4, rows_int4
from microglia.execution.cpu.streams import (
    columns_bf16,
    columns_f16,
    columns_f32,
    columns_int8,
    rows_bf16,
    rows_f16,
    rows_f32,
    rows_int8,
)


def compiled(kind: int, by_columns: bool, sources: str) -> Any:
    """The function for one kind: F32, BF16, F16, INT8, INT4. sources: a fingerprint, by which numba's cache knows it.

    Each is written out: numba compiles whatever a function names, and its cache knows no function that is data.
    """
    if by_columns:
        return cfunc("void(int64, int64, int64, int64, int64)", cache=True, **MATHS)(_down_columns(sources)[kind])
    return cfunc("void(int64, int64, int64)", cache=True, **MATHS)(_along_rows(sources)[kind])


def _along_rows(sources: str) -> tuple[Callable[[int, int, int], None], ...]:
    def f32(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_f32(job, first, last)

    def bf16(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_bf16(job, first, last)

    def f16(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_f16(job, first, last)

    def int8(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_int8(job, first, last)

    def int4(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_int4(job, first, last)

    return f32, bf16, f16, int8, int4


def _down_columns(sources: str) -> tuple[Callable[[int, int, int, int, int], None], ...]:
    def f32(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_f32(job, inputs, count, first, last)

    def bf16(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_bf16(job, inputs, count, first, last)

    def f16(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_f16(job, inputs, count, first, last)

    def int8(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_int8(job, inputs, count, first, last)

    def int4(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_int4(job, inputs, count, first, last)

    return f32, bf16, f16, int8, int4
