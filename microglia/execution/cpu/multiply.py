"""The products of every kind of storage, each compiled for itself and called by its address.

So a model compiles what it needs and no more, and the step none of it.
"""

from typing import Any

from numba import cfunc

from microglia.execution.cpu import tables as t
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
    """The function for one kind. sources: a fingerprint, which numba's cache then knows it by."""
    if by_columns:

        @cfunc("void(int64, int64, int64, int64, int64)", cache=True, **MATHS)
        def columns(job: int, inputs: int, count: int, first: int, last: int) -> None:
            if len(sources) == 0:
                return
            if kind == t.BF16:
                columns_bf16(job, inputs, count, first, last)
            elif kind == t.F32:
                columns_f32(job, inputs, count, first, last)
            elif kind == t.F16:
                columns_f16(job, inputs, count, first, last)
            elif kind == t.INT8:
                columns_int8(job, inputs, count, first, last)
            else:
                columns_int4(job, inputs, count, first, last)

        return columns

    @cfunc("void(int64, int64, int64)", cache=True, **MATHS)
    def rows(job: int, first: int, last: int) -> None:
        if len(sources) == 0:
            return
        if kind == t.BF16:
            rows_bf16(job, first, last)
        elif kind == t.F32:
            rows_f32(job, first, last)
        elif kind == t.F16:
            rows_f16(job, first, last)
        elif kind == t.INT8:
            rows_int8(job, first, last)
        else:
            rows_int4(job, first, last)

    return rows
