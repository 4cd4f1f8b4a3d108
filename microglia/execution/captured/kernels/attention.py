"""Attention of one query per row in parts of the keys, so that the whole device reads them, each of them once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 16  # the fewest rows of a product on tensor cores; a group has fewer query heads
PROGRAMS = 12  # on each multiprocessor, in all: few enough to join cheaply, many enough to end at about the same time


@triton.jit
def _attend_part(
    query, keys, values, mask, own, position, sums, peaks,
    query_row, query_head, mask_row, own_row, room, batch, scale, softcap,
    OWN: tl.constexpr, CAPPED: tl.constexpr, Q: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one group and row: weighted values (…, Q, parts, D), highest logits and sums of weights.

    Weights are relative to the part's highest logit; `peaks` (2, …, Q, parts) holds both. Keys behind the present token
    are not read.
    """
    place, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    group, row = place // batch, place % batch
    length = tl.load(position).to(tl.int32) + 1
    step = tl.cdiv(tl.cdiv(length, parts), KEYS) * KEYS
    start = part * step
    end = tl.minimum(start + step, length)
    n, d, t = tl.arange(0, QUERIES), tl.arange(0, SIZE), tl.arange(0, KEYS)
    head = group * Q + n
    real = n < Q
    if OWN:
        head = tl.load(own + row * own_row + head, mask=real, other=-1).to(tl.int32)
        real = head >= 0
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + d[None, :],
        mask=real[:, None] & (d[None, :] < D),
        other=0.0,
    )
    first_key = place.to(tl.int64) * room * D
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, SIZE], tl.float32)
    for i in range(TIMES):
        s = start + i * KEYS + t
        inside = s < end
        k = tl.load(keys + first_key + s[None, :] * D + d[:, None], mask=(d[:, None] < D) & inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
        added = tl.load(mask + row * mask_row + s, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside[None, :], logits + added[None, :], float("-inf"))
        highest = tl.maximum(best, tl.max(logits, 1))
        highest = tl.where(highest > float("-inf"), highest, 0.0)  # no key yet: -inf less -inf would be no number
        before = tl.exp(best - highest)
        p = tl.exp(logits - highest[:, None])
        v = tl.load(
            values + first_key + s[:, None] * D + d[None, :], mask=(d[None, :] < D) & inside[:, None], other=0.0
        )
        total = total * before + tl.sum(p, 1)
        summed = tl.dot(p.to(v.dtype), v, summed * before[:, None], input_precision="ieee")
        best = tl.where(total > 0, highest, float("-inf"))
    at = (place * Q + n) * parts + part
    tl.store(sums + at[:, None] * D + d[None, :], summed, mask=(n[:, None] < Q) & (d[None, :] < D))
    tl.store(peaks + at, best, mask=n < Q)  # -inf without any key, which then counts for nothing
    tl.store(peaks + tl.num_programs(0) * Q * parts + at, total, mask=n < Q)


@triton.jit
def _join_parts(
    sums, peaks, own, output, own_row, batch, places, parts, slots,
    OWN: tl.constexpr, Q: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One head of one row from its parts; zero for a head that the row has not."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = head
    if OWN:
        s = tl.arange(0, SLOTS)
        mine = tl.load(own + row * own_row + s, mask=s < slots, other=-1).to(tl.int32)
        slot = tl.max(tl.where(mine == head, s, -1), 0)
    there = slot >= 0
    at = (((slot // Q) * batch + row) * Q + slot % Q) * parts
    p, d = tl.arange(0, PARTS), tl.arange(0, SIZE)
    real = (p < parts) & there
    highest = tl.load(peaks + at + p, mask=real, other=float("-inf"))
    total = tl.load(peaks + places * Q * parts + at + p, mask=real, other=0.0)
    top = tl.max(highest, 0)
    weight = tl.exp(highest - tl.where(top > float("-inf"), top, 0.0))
    x = tl.load(sums + (at + p)[:, None] * D + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)
    result = tl.sum(x * weight[:, None], 0) / tl.maximum(tl.sum(weight * total, 0), 1e-30)
    tl.store(output + (row * tl.num_programs(1) + head) * D + d, result.to(output.dtype.element_ty), mask=d < D)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    own: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """See `decode.by_kernel`, whose arguments these are."""
    (batch, heads, _, size), (groups, _, room, _) = query.shape, keys.shape
    slots = heads if own is None else own.shape[-1]
    queries, places, padded = slots // len(keys), groups * batch, triton.next_power_of_2(max(16, size))
    at_once = 64 if padded * keys.element_size() <= 512 else 32  # keys; else they would not fit into shared memory
    parts = max(1, min(room // at_once, -(-PROGRAMS * _multiprocessors(query.device) // places)))
    sums = torch.empty(places * queries * parts, size, dtype=torch.float32, device=query.device)
    peaks = torch.empty(2, places * queries * parts, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    table: Any = mask if own is None else own  # never read without own heads
    _attend_part[(places, parts)](
        query, keys, values, mask, table, position, sums, peaks,
        query.stride(0), query.stride(1), mask.stride(0), table.stride(0), room, batch, scale, softcap,
        OWN=own is not None, CAPPED=softcap > 0, Q=queries, D=size,
        QUERIES=max(QUERIES, triton.next_power_of_2(queries)), SIZE=padded, KEYS=at_once,
        TIMES=triton.cdiv(triton.cdiv(room, parts), at_once),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _join_parts[(batch, heads)](
        sums, peaks, table, output, table.stride(0), batch, places, parts, slots,
        OWN=own is not None, Q=queries, D=size, SIZE=padded,
        PARTS=triton.next_power_of_2(parts), SLOTS=triton.next_power_of_2(slots),
        num_warps=2,
    )  # fmt: skip
    return output


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
