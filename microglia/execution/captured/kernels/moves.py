"""All copies of a switch in one launch: what is copied, and from where, is data on the device."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # words that a program copies: 16 KiB, several loads in flight for every thread


@triton.jit
def _move(table, slots, FIELDS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """A tile of one copy; the fields of a copy are those of `moves.Copy` in order, lengths in words of four bytes."""
    at = table + tl.program_id(0) * FIELDS
    source = tl.load(at).to(tl.pointer_type(tl.int32))
    target = tl.load(at + 1).to(tl.pointer_type(tl.int32))
    unit_at, to_at, kept_at = tl.load(at + 2), tl.load(at + 4), tl.load(at + 5)
    unit_step, to_step, width, total = tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9)
    source_stride, target_stride = tl.load(at + 10), tl.load(at + 11)
    unit = tl.load(at + 3) + tl.load(slots + tl.maximum(unit_at, 0), mask=unit_at >= 0, other=0)
    to = tl.load(slots + tl.maximum(to_at, 0), mask=to_at >= 0, other=0)
    kept = tl.load(slots + tl.maximum(kept_at, 0), mask=kept_at >= 0, other=1)
    source_at, target_at = unit * unit_step, to * to_step
    if ALIGNED:  # to 16 bytes, so that threads copy as much at a time
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        source_at, target_at = tl.multiple_of(source_at, 4), tl.multiple_of(target_at, 4)
        source_stride, target_stride = tl.multiple_of(source_stride, 4), tl.multiple_of(target_stride, 4)
        width, total = tl.multiple_of(width, 4), tl.multiple_of(total, 4)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)[None, :]
    moves = (to_at < 0) | (unit != to)
    inside = (column < width) & (row * width + column < total) & moves
    x = tl.load(source + source_at + row * source_stride + column, mask=inside & (kept != 0), other=0)
    tl.store(target + target_at + row * target_stride + column, x, mask=inside)


def move(table: Tensor, slots: Tensor, wide: int, tiles: int, aligned: bool) -> None:
    """See `moves.move`, whose arguments these are."""
    _move[(len(table), tiles)](
        table, slots, FIELDS=table.shape[1], ALIGNED=aligned, ROWS=rows_of(wide), WIDE=wide, num_warps=4
    )


def rows_of(wide: int) -> int:
    """Rows of a tile of so many columns."""
    return max(1, TILE // wide)


def width_of(words: int) -> int:
    """Columns of a tile for rows of so many words."""
    return int(triton.next_power_of_2(max(64, words)))


def tiles_of(words: int, width: int, wide: int) -> int:
    """Tiles of a copy of so many words in rows of `width`."""
    return int(triton.cdiv(triton.cdiv(words, width), rows_of(wide)))
