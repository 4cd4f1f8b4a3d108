"""The products of every kind of storage, each compiled for itself and called by its address.

So a model compiles what it needs and no more, and the step none of it.
"""

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

    def f32_rows(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_f32(job, first, last)

    def f32_columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_f32(job, inputs, count, first, last)

    def bf16_rows(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_bf16(job, first, last)

    def bf16_columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_bf16(job, inputs, count, first, last)

    def f16_rows(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_f16(job, first, last)

    def f16_columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_f16(job, inputs, count, first, last)

    def int8_rows(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_int8(job, first, last)

    def int8_columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_int8(job, inputs, count, first, last)

    def int4_rows(job: int, first: int, last: int) -> None:
        if len(sources) > 0:
            rows_int4(job, first, last)

    def int4_columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
        if len(sources) > 0:
            columns_int4(job, inputs, count, first, last)

    by_rows = (f32_rows, bf16_rows, f16_rows, int8_rows, int4_rows)
    down_columns = (f32_columns, bf16_columns, f16_columns, int8_columns, int4_columns)
    signature = "void(int64, int64, int64, int64, int64)" if by_columns else "void(int64, int64, int64)"
    return cfunc(signature, cache=True, **MATHS)((down_columns if by_columns else by_rows)[kind])
