"""Numbers at addresses, and how threads wait for each other: the few lines of machine code that numba lacks.

A step reads hundreds of arrays whose number and shapes differ from model to model. As arguments they would make numba
compile one function for each model; as addresses in a table they are data, and one compiled function serves them all.
"""

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be taken in another order, as vectors; infinities and NaN stay what they are.
MATHS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}}
FAST: dict[str, Any] = {**MATHS, "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Looks before a waiting thread gives its core to others: with 20,000 a step on busy cores took three times as long.
SPINS = 2_000
Reader = Callable[[int, int], float]
Writer = Callable[[int, int, float], None]
_BYTE, _HALF, _WORD, _LONG, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _at(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


def _reader(kind: Any, result: Any, widened: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic (address, index) → the value there, widened to `result`."""

    @intrinsic
    def read(_: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return widened(builder, builder.load(_at(builder, args[0], args[1], kind)))

        return result(types.int64, types.int64), generate

    return read


def _writer(kind: Any, given: Any, narrowed: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic (address, index, value) that writes the value there, narrowed to `kind`."""

    @intrinsic
    def write(_: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(narrowed(builder, args[2]), _at(builder, args[0], args[1], kind))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, given), generate

    return write


def _from_bf16(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, _WORD), _WORD(16)), _FLOAT)


def _to_bf16(b: Any, x: Any) -> Any:
    """Rounded to the nearest, ties to even."""
    bits = b.bitcast(x, _WORD)
    odd = b.and_(b.lshr(bits, _WORD(16)), _WORD(1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, _WORD(0x7FFF))), _WORD(16)), _HALF)


f32: Reader = _reader(_FLOAT, types.float32, lambda b, x: x)
bf16: Reader = _reader(_HALF, types.float32, _from_bf16)
f16: Reader = _reader(_HALF, types.float32, lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), _FLOAT))
i8: Reader = _reader(_BYTE, types.float32, lambda b, x: b.sitofp(x, _FLOAT))
whole: Callable[[int, int], int] = _reader(_LONG, types.int64, lambda b, x: x)
real: Reader = _reader(ir.DoubleType(), types.float32, lambda b, x: b.fptrunc(x, _FLOAT))

put_f32: Writer = _writer(_FLOAT, types.float32, lambda b, x: x)
put_bf16: Writer = _writer(_HALF, types.float32, _to_bf16)
put_f16: Writer = _writer(_HALF, types.float32, lambda b, x: b.bitcast(b.fptrunc(x, ir.HalfType()), _HALF))
put_whole: Callable[[int, int, int], None] = _writer(_LONG, types.int64, lambda b, x: x)


def _caller(count: int) -> Any:
    """An intrinsic (address of machine code, numbers): calls code that takes `count` integers and returns nothing."""

    @intrinsic
    def call(_: Any, code: Any, numbers: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [_LONG] * count)
            function = builder.inttoptr(args[0], kind.as_pointer())
            builder.call(function, [builder.extract_value(args[1], i) for i in range(count)])
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, count)), generate

    return call


call3: Callable[[int, tuple[int, int, int]], None] = _caller(3)
call5: Callable[[int, tuple[int, int, int, int, int]], None] = _caller(5)


def _stand_alone(_: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def _power_of_two(_: Any, exponent: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], _WORD(127)), _WORD(23)), _FLOAT)

    return types.float32(types.int32), generate


def _add_one(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", place, _LONG(1), "seq_cst")

    return types.int64(types.int64), generate


def _look(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


def _fetch(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.inttoptr(args[0], _BYTE.as_pointer()), _WORD(0), _WORD(3), _WORD(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _rest(_: Any) -> Any:
    machine = platform.machine().lower()
    name = {"x86_64": "llvm.x86.sse2.pause", "amd64": "llvm.x86.sse2.pause"}.get(machine)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if name is not None:
            kind = ir.FunctionType(ir.VoidType(), [])
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


# Said in a function, it is not written into those that call it, which takes less time to compile.
stand_alone: Callable[[], None] = intrinsic(_stand_alone)
# 2 to an integer power (int32) as float32, by its bits.
power_of_two: Callable[[Any], float] = intrinsic(_power_of_two)
# Asks for the 64 bytes at an address, which will be read soon.
fetch: Callable[[int], None] = intrinsic(_fetch)
_counted: Callable[[int], int] = intrinsic(_add_one)
_count: Callable[[int], int] = intrinsic(_look)
# Tells the core that its thread waits, so that what else runs on it runs better.
_pause: Callable[[], None] = intrinsic(_rest)
_give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


def single(x: float) -> float:
    """A constant in float32: what is written as a number is a double, and so would be all that it meets."""
    return np.float32(x)  # type: ignore[return-value]  # numba's float


ZERO, ONE, LOWEST = single(0), single(1), single(-np.inf)


@njit(**FAST)
def meet(counter: int, threads: int, meetings: int) -> int:
    """Wait until all threads are here for the time after `meetings` others. Returns one more."""
    if threads > 1:
        _counted(counter)
        spins = 0
        while _count(counter) < (meetings + 1) * threads:
            spins += 1
            if spins < SPINS:
                _pause()
            else:
                _give_way()
    return meetings + 1
