"""The decode step: one function from the last tokens to the logits, on every thread at once.

Each thread keeps the hidden states for itself and computes what is small (norms, residuals) as often as there are
threads; what is large is shared, and five times a layer all wait for each other. What is called once is written into
its caller: every level of functions is compiled with all that it calls, and four levels took twice the time.
"""

from typing import Any

from numba import njit

from microglia.execution.cpu import tables as t
from microglia.execution.cpu.attention import attend, rotations
from microglia.execution.cpu.functions import activated, normed, tanh
from microglia.execution.cpu.memory import (
    FAST,
    LOWEST,
    MATHS,
    ZERO,
    bf16,
    f16,
    f32,
    meet,
    put_f32,
    put_whole,
    real,
    stand_alone,
    whole,
)
from microglia.execution.cpu.products import Runs, Share, Vectors, bounds, product, summed


@njit(**FAST)
def _norm(norm: int, x: int, out: int, size: int) -> None:
    weight, bias = whole(norm, t.NORM_WEIGHT), whole(norm, t.NORM_BIAS)
    normed(whole(norm, t.NORM_KIND), weight, bias, real(norm, t.NORM_EPS), x, out, size)


@njit(**FAST)
def _number(kind: int, at: int, i: int) -> float:
    if kind == t.BF16:
        return bf16(at, i)
    return f16(at, i) if kind == t.F16 else f32(at, i)


@njit(**FAST)
def _embed(plan: int, place: int, hidden: int) -> None:
    """The embeddings of the last tokens, with their positions' where the model has such."""
    stand_alone()
    size, kind = whole(plan, t.HIDDEN), whole(plan, t.EMBEDDING_KIND)
    factor, positions = real(plan, t.EMBEDDING_FACTOR), whole(plan, t.POSITIONS)
    for row in range(whole(plan, t.BATCH)):
        token = whole(whole(plan, t.TOKENS), row)
        out = hidden + 4 * size * row
        for i in range(size):
            put_f32(out, i, _number(kind, whole(plan, t.EMBEDDING), token * size + i) * factor)
        if positions != 0:
            first = (place - whole(whole(plan, t.STARTS), row)) * size
            for i in range(size):
                put_f32(out, i, f32(out, i) + _number(kind, positions, first + i))


@njit(**FAST)
def _all_normed(plan: int, norm: int, hidden: int, out: int) -> None:
    stand_alone()
    size = whole(plan, t.HIDDEN)
    for row in range(whole(plan, t.BATCH)):
        _norm(norm, hidden + 4 * size * row, out + 4 * size * row, size)


@njit(**FAST)
def _added(plan: int, layer: int, parts: int, norm: int, hidden: int, scratch: int, fill: int) -> None:
    """Add what a half of the layer gave to the hidden states, normed first where the family does that."""
    stand_alone()
    size, batch, given = whole(plan, t.HIDDEN), whole(plan, t.BATCH), whole(plan, t.OUT_PARTS)
    for row in range(batch):
        x, out = hidden + 4 * size * row, scratch + 4 * size * row
        for i in range(size):
            put_f32(out, i, summed(given, row * size + i, parts, 4 * batch * size))
        if fill != 0:
            for i in range(size):
                put_f32(out, i, f32(out, i) + f32(fill, row * size + i))
        if norm != 0:
            _norm(norm, out, out, size)
        for i in range(size):
            put_f32(x, i, f32(x, i) + f32(out, i))


@njit(inline="always", **FAST)
def _attention(plan: int, layer: int, place: int, share: Share, hidden: int, met: int) -> int:
    """The first half of a layer."""
    size, batch, threads = whole(plan, t.HIDDEN), whole(plan, t.BATCH), whole(plan, t.THREADS)
    private = share.thread * whole(plan, t.PRIVATE_STEP)
    normal = whole(plan, t.NORMED_OF) + private
    width, head = whole(plan, t.ATTENTION_WIDTH), whole(layer, t.SIZE)
    part, given = 4 * width * batch, whole(plan, t.ATTENTION_PARTS)
    heads = Runs(whole(layer, t.HEAD_RUNS), whole(layer, t.HEAD_RUN_COUNT), whole(layer, t.HEADS_KEPT), head)
    groups = Runs(whole(layer, t.GROUP_RUNS), whole(layer, t.GROUP_RUN_COUNT), whole(layer, t.GROUPS_KEPT), head)
    every = Runs(whole(plan, t.EVERY_HIDDEN), 1, size, 1)
    _all_normed(plan, whole(layer, t.NORM_ATTENTION), hidden, normal)
    keys = given + 4 * whole(layer, t.HEADS) * head
    values = keys + 4 * whole(layer, t.GROUPS) * head
    q = product(whole(layer, t.QUERY), Vectors(normal, 4 * size, batch, given, 4 * width), every, heads, share, part)
    k = product(whole(layer, t.KEY), Vectors(normal, 4 * size, batch, keys, 4 * width), every, groups, share, part)
    v = product(whole(layer, t.VALUE), Vectors(normal, 4 * size, batch, values, 4 * width), every, groups, share, part)
    met = meet(whole(plan, t.COUNTER), threads, met)
    attend(
        plan, layer, place, share, (q, k, v), (whole(plan, t.SCORES_OF) + private, whole(plan, t.ROTATION_OF) + private)
    )
    met = meet(whole(plan, t.COUNTER), threads, met)
    attended = Vectors(whole(plan, t.ATTENDED), 4 * width, batch, whole(plan, t.OUT_PARTS), 4 * size)
    parts = product(whole(layer, t.OUTPUT), attended, heads, every, share, 4 * batch * size)
    met = meet(whole(plan, t.COUNTER), threads, met)
    _added(plan, layer, parts, whole(layer, t.NORM_ATTENDED), hidden, normal, whole(layer, t.FILL))
    return met


@njit(**FAST)
def _activate(plan: int, layer: int, share: Share, gates: int, ups: int) -> None:
    """What goes into the projection down, of this thread's share of the channels."""
    stand_alone()
    batch, width, kind = whole(plan, t.BATCH), whole(plan, t.MLP_WIDTH), whole(layer, t.ACTIVATION)
    part, channels = 4 * width * batch, whole(layer, t.CHANNELS)
    first, last = bounds(whole(layer, t.CHANNELS_KEPT), share)
    seen = 0
    for r in range(whole(layer, t.CHANNEL_RUN_COUNT)):
        start, length = whole(whole(layer, t.CHANNEL_RUNS), 2 * r), whole(whole(layer, t.CHANNEL_RUNS), 2 * r + 1)
        a, b = start + max(first - seen, 0), start + min(last - seen, length)
        seen += length
        for row in range(batch):
            given, out = whole(plan, t.MLP_PARTS) + 4 * row * width, whole(plan, t.FED) + 4 * row * width
            for c in range(a, b):
                if gates > 0:
                    up = summed(given, channels + c, ups, part)
                    put_f32(out, c, activated(kind, summed(given, c, gates, part)) * up)
                else:
                    put_f32(out, c, activated(kind, summed(given, channels + c, ups, part)))


@njit(inline="always", **FAST)
def _mlp(plan: int, layer: int, share: Share, hidden: int, met: int) -> int:
    """The second half of a layer."""
    size, batch, threads = whole(plan, t.HIDDEN), whole(plan, t.BATCH), whole(plan, t.THREADS)
    normal = whole(plan, t.NORMED_OF) + share.thread * whole(plan, t.PRIVATE_STEP)
    width, given = whole(plan, t.MLP_WIDTH), whole(plan, t.MLP_PARTS)
    part, every = 4 * width * batch, Runs(whole(plan, t.EVERY_HIDDEN), 1, size, 1)
    kept = Runs(whole(layer, t.CHANNEL_RUNS), whole(layer, t.CHANNEL_RUN_COUNT), whole(layer, t.CHANNELS_KEPT), 1)
    _all_normed(plan, whole(layer, t.NORM_MLP), hidden, normal)
    gates = 0
    if whole(layer, t.GATE) != 0:
        gate = Vectors(normal, 4 * size, batch, given, 4 * width)
        gates = product(whole(layer, t.GATE), gate, every, kept, share, part)
    up = Vectors(normal, 4 * size, batch, given + 4 * whole(layer, t.CHANNELS), 4 * width)
    ups = product(whole(layer, t.UP), up, every, kept, share, part)
    if max(gates, ups) > 1:  # else every thread has all it needs
        met = meet(whole(plan, t.COUNTER), threads, met)
    _activate(plan, layer, share, gates, ups)
    met = meet(whole(plan, t.COUNTER), threads, met)
    fed = Vectors(whole(plan, t.FED), 4 * width, batch, whole(plan, t.OUT_PARTS), 4 * size)
    parts = product(whole(layer, t.DOWN), fed, kept, every, share, 4 * batch * size)
    met = meet(whole(plan, t.COUNTER), threads, met)
    _added(plan, layer, parts, whole(layer, t.NORM_FED), hidden, normal, 0)
    return met


@njit(inline="always", **FAST)
def logits(plan: int, place: int, share: Share, met: int) -> int:
    """The logits of what follows the last tokens; returns how often the threads have met. Some may be written later."""
    size, batch, vocabulary = whole(plan, t.HIDDEN), whole(plan, t.BATCH), whole(plan, t.VOCABULARY)
    private = share.thread * whole(plan, t.PRIVATE_STEP)
    hidden, normal = whole(plan, t.HIDDEN_OF) + private, whole(plan, t.NORMED_OF) + private
    _embed(plan, place, hidden)
    rotations(plan, place, whole(plan, t.ROTATION_OF) + private)
    for index in range(whole(plan, t.LAYER_COUNT)):
        layer = whole(plan, t.LAYERS) + 8 * t.LAYER_FIELDS * index
        met = _attention(plan, layer, place, share, hidden, met)
        met = _mlp(plan, layer, share, hidden, met)
    _all_normed(plan, whole(plan, t.NORM_LAST), hidden, normal)
    out, cap = whole(plan, t.LOGITS), real(plan, t.LOGIT_CAP)
    every, tokens = Runs(whole(plan, t.EVERY_HIDDEN), 1, size, 1), Runs(whole(plan, t.EVERY_TOKEN), 1, vocabulary, 1)
    last = Vectors(normal, 4 * size, batch, out, 4 * vocabulary)
    product(whole(plan, t.HEAD), last, every, tokens, share, 0)
    if cap > ZERO:
        first, end = bounds(vocabulary, share)
        for row in range(batch):
            for i in range(first, end):
                at = row * vocabulary + i
                put_f32(out, at, cap * tanh(f32(out, at) / cap))
    return met


@njit(**FAST)
def _likeliest(plan: int, share: Share, met: int) -> int:
    """Every row's likeliest token into the list of this thread; returns how often the threads have met."""
    stand_alone()
    batch, vocabulary, best = whole(plan, t.BATCH), whole(plan, t.VOCABULARY), whole(plan, t.BEST)
    first, last = bounds(vocabulary, share)
    for row in range(batch):
        out, token, top = whole(plan, t.LOGITS) + 4 * row * vocabulary, first, LOWEST
        for i in range(first, last):
            if f32(out, i) > top:
                token, top = i, f32(out, i)
        put_whole(best, share.thread * batch + row, token)
    met = meet(whole(plan, t.COUNTER), share.threads, met)
    for row in range(batch):
        out, token = whole(plan, t.LOGITS) + 4 * row * vocabulary, whole(best, row)
        for other in range(1, share.threads):
            candidate = whole(best, other * batch + row)
            if f32(out, candidate) > f32(out, token):
                token = candidate
        put_whole(share.scratch, row, token)
    return met


@njit(**FAST)
def _take(plan: int, share: Share, done: int) -> None:
    """Take the likeliest tokens as the answers' next; an answer that has ended goes on with padding."""
    stand_alone()
    batch, all_ended = whole(plan, t.BATCH), 1
    for row in range(batch):
        token, ended = whole(share.scratch, row), whole(whole(plan, t.ENDED), row)
        if ended != 0:
            token = whole(plan, t.PAD)
        for stop in range(whole(plan, t.STOP_COUNT)):
            if token == whole(whole(plan, t.STOPS), stop):
                ended = 1
        all_ended = min(all_ended, ended)
        put_whole(whole(plan, t.TOKENS), row, token)
        put_whole(whole(plan, t.ANSWER), row * whole(plan, t.ANSWER_LENGTH) + done, token)
        put_whole(whole(plan, t.ENDED), row, ended)
    put_whole(plan, t.ALL_ENDED, all_ended)


def compiled(sources: str) -> Any:
    """The step in machine code, compiled now or read from numba's cache of compiled functions.

    sources: a fingerprint of all files of the step. numba looks at this file only, so it is made part of the function.
    """

    @njit("int64(int64, int64, int64, int64, int64)", cache=True, nogil=True, **MATHS)
    def write(plan: int, thread: int, place: int, steps: int, first: int) -> int:
        """What every thread does for `steps` tokens from `place` in the cache on; returns how many there were.

        first: where in the answers they belong, or -1 for a single step that leaves its logits and chooses nothing.
        """
        threads, private = whole(plan, t.THREADS), thread * whole(plan, t.PRIVATE_STEP)
        share = Share(thread, threads, whole(plan, t.LIST_OF) + private, whole(plan, t.JOB_OF) + private)
        met, done = 0, 0
        while done < steps and len(sources) > 0:
            met = logits(plan, place + done, share, met)
            done += 1
            if first < 0:
                continue
            met = _likeliest(plan, share, met)
            if thread == 0:
                _take(plan, share, first + done - 1)
            met = meet(whole(plan, t.COUNTER), threads, met)
            if whole(plan, t.ALL_ENDED) != 0:
                break
        return done

    return write
