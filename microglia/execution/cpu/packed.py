"""The products of `streams` over weights in 4 bits: groups of GROUP along a stored row, with a float32 scale each.

Byte k of a group holds number k in its low half and number k + 16 in its high half, each plus 8. A compiler makes no
vectors of this by itself (half a gigabyte a second), so the group is written as vectors here; how wide they are on a
machine is still the compiler's business.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.memory import FAST, f32, whole
from microglia.execution.cpu.quantise import GROUP

_LANES = GROUP // 2
_LONG, _WORD = ir.IntType(64), ir.IntType(32)
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), _LANES), ir.VectorType(ir.IntType(32), _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_MATHS = ("reassoc", "contract", "nsz")


def _vector(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _unpacked(b: Any, address: Any) -> tuple[Any, Any]:
    """The low and the high halves of the 16 bytes at an address, as floats."""
    packed = b.load(_vector(b, address, _BYTES), align=1)

    def floats(x: Any) -> Any:
        centred = b.sub(x, ir.Constant(_BYTES, [8] * _LANES))
        return b.sitofp(b.sext(centred, _WORDS), _FLOATS)

    low = b.and_(packed, ir.Constant(_BYTES, [15] * _LANES))
    return floats(low), floats(b.lshr(packed, ir.Constant(_BYTES, [4] * _LANES)))


def _spread(b: Any, x: Any) -> Any:
    """A number in every lane."""
    one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), x, _WORD(0))
    return b.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_WORDS, [0] * _LANES))


def _group(b: Any, row: Any, x: Any, total: Any, scale: Any) -> Any:
    """total + scale times the products of the 32 numbers at row and at x, lane by lane."""
    low, high = _unpacked(b, row)
    first = b.load(_vector(b, x, _FLOATS), align=4)
    second = b.load(_vector(b, b.add(x, _LONG(4 * _LANES)), _FLOATS), align=4)
    product = b.fadd(b.fmul(low, first, _MATHS), b.fmul(high, second, _MATHS), _MATHS)
    return b.fadd(total, b.fmul(product, _spread(b, scale), _MATHS), _MATHS)


def _reduced(b: Any, total: Any) -> Any:
    while total.type.count > 1:
        half = total.type.count // 2
        low, high = (ir.Constant(ir.VectorType(_WORD, half), list(range(i, i + half))) for i in (0, half))
        total = b.fadd(*(b.shuffle_vector(total, total, part) for part in (low, high)), _MATHS)
    return b.extract_element(total, _WORD(0))


@intrinsic
def _four(_: Any, rows: Any, scales: Any, x: Any, groups: Any, out: Any) -> Any:
    """Four rows times one vector. rows, scales, out: the first's address, and how far the next one is."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows, scales, x, groups, out = args
        places = []
        for pair in (rows, scales, out):
            start, far = b.extract_value(pair, 0), b.extract_value(pair, 1)
            places.append([b.add(start, b.mul(far, _LONG(i))) for i in range(4)])
        before, loop, after = b.block, b.append_basic_block("group"), b.append_basic_block("done")
        zero = ir.Constant(_FLOATS, [0.0] * _LANES)
        b.branch(loop)
        b.position_at_end(loop)
        g, totals = b.phi(_LONG), [b.phi(_FLOATS) for _ in range(4)]
        g.add_incoming(_LONG(0), before)
        place, next_g = b.add(x, b.mul(g, _LONG(4 * GROUP))), b.add(g, _LONG(1))
        for row, scale, total in zip(places[0], places[1], totals, strict=True):
            factor = b.load(b.inttoptr(b.add(scale, b.mul(g, _LONG(4))), ir.FloatType().as_pointer()))
            total.add_incoming(zero, before)
            total.add_incoming(_group(b, b.add(row, b.mul(g, _LONG(_LANES))), place, total, factor), loop)
        g.add_incoming(next_g, loop)
        b.cbranch(b.icmp_signed("<", next_g, groups), loop, after)
        b.position_at_end(after)
        for total, at in zip(totals, places[2], strict=True):
            b.store(_reduced(b, total.incomings[1][0]), b.inttoptr(at, ir.FloatType().as_pointer()))
        return context.get_dummy_value()

    pair = types.UniTuple(types.int64, 2)
    return types.void(pair, pair, types.int64, types.int64, pair), generate


@intrinsic
def _scatter(_: Any, out: Any, factor: Any, row: Any) -> Any:
    """Add factor times the 32 numbers at row to the 32 floats at out."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, factor, row = args
        spread = _spread(b, factor)
        for half, numbers in enumerate(_unpacked(b, row)):
            place = _vector(b, b.add(out, _LONG(4 * _LANES * half)), _FLOATS)
            b.store(b.fadd(b.load(place, align=4), b.fmul(numbers, spread, _MATHS), _MATHS), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@njit(**FAST)
def rows_int4(job: int, first: int, last: int) -> None:
    """The outputs first … last of every vector of a job."""
    quarter, vectors, step = (last - first) // 4, whole(job, t.JOB_COUNT), whole(job, t.JOB_STEP)
    x, x_step, groups = whole(job, t.JOB_X), whole(job, t.JOB_X_STEP), whole(job, t.JOB_LENGTH) // GROUP
    out, out_step = whole(job, t.JOB_OUT), whole(job, t.JOB_OUT_STEP)
    base, scales, scale_step = whole(job, t.JOB_BASE), whole(job, t.JOB_SCALES), 4 * groups
    for r in range(first, first + quarter):
        for i in range(vectors):
            rows, own = (base + r * step, quarter * step), (scales + r * scale_step, quarter * scale_step)
            _four(rows, own, x + i * x_step, groups, (out + i * out_step + 4 * r, 4 * quarter))
    for r in range(first + 4 * quarter, last):  # the same row four times: there are three such rows at most
        for i in range(vectors):
            own = (scales + r * scale_step, 0)
            _four((base + r * step, 0), own, x + i * x_step, groups, (out + i * out_step + 4 * r, 0))


@njit(**FAST)
def columns_int4(job: int, inputs: int, count: int, first: int, last: int) -> None:
    """Add what `count` inputs, by the list at `inputs`, give to outputs first … last, whole groups, of every vector."""
    groups, quarter = whole(job, t.JOB_LENGTH) // GROUP, max(1, count // 4)
    base, step, scales = whole(job, t.JOB_BASE), whole(job, t.JOB_STEP), whole(job, t.JOB_SCALES)
    for k in range(quarter):
        for place in range(k, count, quarter):
            i = whole(inputs, place)
            for vector in range(whole(job, t.JOB_COUNT)):
                x = f32(whole(job, t.JOB_X) + vector * whole(job, t.JOB_X_STEP), i)
                out = whole(job, t.JOB_OUT) + vector * whole(job, t.JOB_OUT_STEP)
                for g in range(first // GROUP, last // GROUP):
                    factor = x * f32(scales, i * groups + g)
                    _scatter(out + 4 * GROUP * g, factor, base + i * step + _LANES * g)
