"""Attention of one new token: its keys and values go into the cache, and its query heads look at what is there.

A unit is one query head of one row; threads share units, not groups, since there may be two groups and three threads.
A thread writes the new key and value of every group that it looks at: two threads may write the same numbers.
"""

import numpy as np
from numba import njit

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.functions import exponential, normed, tanh
from microglia.execution.cpu.memory import (
    FAST,
    LOWEST,
    ZERO,
    call3,
    call5,
    f32,
    put_bf16,
    put_f16,
    put_f32,
    real,
    stand_alone,
    whole,
)
from microglia.execution.cpu.products import Share, Vectors, bounds, ordered, summed


@njit(**FAST)
def rotations(plan: int, place: int, own: int) -> None:
    """Cosines and sines of the new token's position in every row, for every rotary embedding of the model."""
    stand_alone()
    width, batch = whole(plan, t.ROTARY_WIDTH), whole(plan, t.BATCH)
    for kind in range(whole(plan, t.ROTARY_COUNT)):
        rotary = whole(plan, t.ROTARIES) + 8 * t.ROTARY * kind
        frequencies, factor = whole(rotary, t.FREQUENCIES), real(rotary, t.ROTARY_FACTOR)
        for row in range(batch):
            position = np.float32(place - whole(whole(plan, t.STARTS), row))
            out = own + 8 * width * (kind * batch + row)
            for i in range(whole(rotary, t.FREQUENCY_COUNT)):
                angle = position * f32(frequencies, i)
                put_f32(out, i, np.cos(angle) * factor)
                put_f32(out, width + i, np.sin(angle) * factor)


@njit(**FAST)
def _prepared(plan: int, layer: int, norm: int, row: int, own: int, x: int) -> None:
    """The norm of one head and its rotation, in place."""
    stand_alone()
    size = whole(layer, t.SIZE)
    if norm != 0:
        weight, bias = whole(norm, t.NORM_WEIGHT), whole(norm, t.NORM_BIAS)
        normed(whole(norm, t.NORM_KIND), weight, bias, real(norm, t.NORM_EPS), x, x, size)
    kind = whole(layer, t.ROTARY_AT)
    if kind >= 0:
        width = whole(plan, t.ROTARY_WIDTH)
        cosines = own + 8 * width * (kind * whole(plan, t.BATCH) + row)
        half = whole(whole(plan, t.ROTARIES) + 8 * t.ROTARY * kind, t.FREQUENCY_COUNT)
        for i in range(half):
            c, s, a, b = f32(cosines, i), f32(cosines, width + i), f32(x, i), f32(x, half + i)
            put_f32(x, i, a * c - b * s)
            put_f32(x, half + i, b * c + a * s)


@njit(**FAST)
def _stored(kind: int, at: int, x: int, size: int) -> None:
    stand_alone()
    if kind == t.BF16:
        for i in range(size):
            put_bf16(at, i, f32(x, i))
    elif kind == t.F16:
        for i in range(size):
            put_f16(at, i, f32(x, i))
    else:
        for i in range(size):
            put_f32(at, i, f32(x, i))


@njit(**FAST)
def _weighted(scores: int, count: int, scaling: float, cap: float) -> None:
    """Scores to weights: scaled, capped where there is a cap, their softmax."""
    stand_alone()
    top = LOWEST
    for i in range(count):
        score = f32(scores, i) * scaling
        if cap > ZERO:
            score = cap * tanh(score / cap)
        put_f32(scores, i, score)
        top = max(top, score)
    total = ZERO
    for i in range(count):
        weight = exponential(f32(scores, i) - top)
        put_f32(scores, i, weight)
        total += weight
    for i in range(count):
        put_f32(scores, i, f32(scores, i) / total)


@njit(**FAST)
def _attend(plan: int, layer: int, cache: int, seen: tuple[int, int], own: int, out: int, job: int) -> None:
    """One query (at `own`) over the places `seen` of the keys and values at offset `cache`."""
    stand_alone()
    kind, size = whole(plan, t.CACHE_KIND), whole(layer, t.SIZE)
    first, count = seen
    step = size * (4 if kind == t.F32 else 2)
    scores = own + 4 * size
    offset = cache + first * step
    keys = ordered(job, whole(layer, t.KEYS) + offset, step, size, Vectors(own, 0, 1, scores, 0))
    call3(whole(plan, t.KEY_CODE), (keys, 0, count))
    _weighted(scores, count, real(layer, t.SCALING), real(layer, t.SOFTCAP))
    for i in range(size):
        put_f32(out, i, ZERO)
    values = ordered(job, whole(layer, t.VALUES) + offset, step, size, Vectors(scores, 0, 1, out, 0))
    call5(whole(plan, t.VALUE_CODE), (values, whole(plan, t.IOTA), count, 0, size))


@njit(**FAST)
def attend(plan: int, layer: int, place: int, share: Share, parts: tuple[int, int, int], own: tuple[int, int]) -> None:
    """This thread's units. parts: of queries, keys and values. own: this thread's room for scores and its rotations."""
    stand_alone()
    size, window, kind = whole(layer, t.SIZE), whole(layer, t.WINDOW), whole(plan, t.CACHE_KIND)
    width, part = whole(plan, t.ATTENTION_WIDTH), 4 * whole(plan, t.ATTENTION_WIDTH) * whole(plan, t.BATCH)
    key_at = whole(layer, t.HEADS) * size
    value_at = key_at + whole(layer, t.GROUPS) * size
    first, last = bounds(whole(layer, t.UNIT_COUNT), share)
    scores, rotated = own
    before = -1
    for u in range(first, last):
        unit = whole(layer, t.UNITS) + 8 * t.UNIT * u
        row, head, group, slot = whole(unit, 0), whole(unit, 1), whole(unit, 2), whole(unit, 3)
        out = whole(plan, t.ATTENDED) + 4 * (row * width + head * size)
        if slot < 0:
            for i in range(size):
                put_f32(out, i, ZERO)
            continue
        given = whole(plan, t.ATTENTION_PARTS) + 4 * row * width
        cache = row * whole(layer, t.CACHE_ROW) + slot * whole(layer, t.CACHE_SLOT)
        if cache != before:
            at = cache + place * size * (4 if kind == t.F32 else 2)
            for i in range(size):
                put_f32(scores, i, summed(given, key_at + group * size + i, parts[1], part))
            _prepared(plan, layer, whole(layer, t.NORM_KEY), row, rotated, scores)
            _stored(kind, whole(layer, t.KEYS) + at, scores, size)
            for i in range(size):
                put_f32(scores, i, summed(given, value_at + group * size + i, parts[2], part))
            _stored(kind, whole(layer, t.VALUES) + at, scores, size)
            before = cache
        for i in range(size):
            put_f32(scores, i, summed(given, head * size + i, parts[0], part))
        _prepared(plan, layer, whole(layer, t.NORM_QUERY), row, rotated, scores)
        start = whole(whole(plan, t.STARTS), row)
        if window > 0:
            start = max(start, place + 1 - window)
        _attend(plan, layer, cache, (start, place + 1 - start), scores, out, share.job)
