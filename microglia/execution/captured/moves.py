"""The copies of a switch as data: which heads go where stands in the slots of a decision, everything else is known.

A switch of one layer copies rows of q, k and v, columns of the output projection, and keys and values: one by one,
they are a dozen small kernels. Where kernels run, a block's copies are one table and one launch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from microglia.execution.captured import kernels

WORD, VECTOR = 4, 16  # bytes: what the kernel counts in, and what a thread copies at a time where all is aligned to it
WIDE = 256  # bytes in a row of a copy that is all in one piece


@dataclass(frozen=True)
class Copy:
    """Bytes from one place to another: `total` of them in rows of `width`, which lie `…_stride` apart.

    source, target: addresses. unit_at: where in the slots the unit that is copied stands, -1 for nowhere; unit_first is
    added to it, and units lie unit_step bytes apart. to_at, to_step: the same of the unit that it becomes; a unit that
    stays where it is is not copied. kept_at: where the slots say whether it is kept, else zeros are written.
    """

    source: int
    target: int
    unit_at: int
    unit_first: int
    to_at: int
    kept_at: int
    unit_step: int
    to_step: int
    width: int
    total: int
    source_stride: int
    target_stride: int

    def is_made_of(self, size: int) -> bool:
        """Whether every address and length is a multiple of so many bytes."""
        lengths = self.unit_step, self.to_step, self.width, self.total, self.source_stride, self.target_stride
        return not any(x % size for x in (self.source, self.target, *lengths))

    @property
    def fields(self) -> tuple[int, ...]:
        """As the kernel reads them: lengths in words."""
        every = astuple(self)
        return (*every[:6], *(x // WORD for x in every[6:]))


def copies_of_units(
    source: Tensor, target: Tensor, dim: int, size: int, units: Sequence[tuple[int, int, int]]
) -> Iterator[Copy]:
    """Every unit of `target`, so many rows (dim 0) or columns (dim 1), from the unit of `source` that the slots name.

    units: for each of them unit_at, unit_first and kept_at, see `Copy`.
    """
    rows = [x.element_size() * x[0].numel() for x in (source, target)]  # bytes
    if dim == 0:
        step = total = size * rows[0]
        width, strides = WIDE, [WIDE, WIDE]
    else:
        step = width = size * source.element_size()
        total, strides = width * len(source), rows
    for place, (unit_at, first, kept_at) in enumerate(units):
        start = target.data_ptr() + place * step
        yield Copy(source.data_ptr(), start, unit_at, first, -1, kept_at, step, 0, width, total, *strides)


def copies_of_blocks(x: Tensor, moves: Sequence[tuple[int, int]]) -> Iterator[Copy]:
    """Blocks (N, …) of a tensor to other places in it: for each where the slots say from where, and to where."""
    size = x.element_size() * x[0].numel()
    for unit_at, to_at in moves:
        yield Copy(x.data_ptr(), x.data_ptr(), unit_at, 0, to_at, -1, size, size, WIDE, size, WIDE, WIDE)


class Moves:
    """Copies that are made together, by one kernel; the slots that they look at are static."""

    def __init__(self, copies: Sequence[Copy], slots: Tensor) -> None:
        from microglia.execution.captured.kernels.moves import tiles_of, width_of  # Triton may be missing

        self.slots = slots
        self.wide = width_of(max(copy.width for copy in copies) // WORD)
        self.tiles = max(tiles_of(copy.total // WORD, copy.width // WORD, self.wide) for copy in copies)
        self.aligned = all(copy.is_made_of(VECTOR) for copy in copies)
        with torch.inference_mode(False):
            self.table = torch.tensor([copy.fields for copy in copies], dtype=torch.long).to(slots.device)

    @classmethod
    def of(cls, parts: Iterable[Sequence[Copy] | None], slots: Tensor) -> "Moves | None":
        """None where nothing is to be copied, or where something (a part that is None) is not made of whole words."""
        copies: list[Copy] = []
        for part in parts:
            if part is None or not all(copy.is_made_of(WORD) for copy in part):
                return None
            copies += part
        return cls(copies, slots) if copies else None

    def make(self) -> None:
        """Copy what the present slots say."""
        move(self.table, self.slots, self.wide, self.tiles, self.aligned)


@torch.library.custom_op("microglia::move", mutates_args=())
def move(table: Tensor, slots: Tensor, wide: int, tiles: int, aligned: bool) -> None:
    """Make the copies of a table (N, fields of `Copy`). One operation to a tape; it writes to addresses."""
    assert kernels.usable(table.device)
    from microglia.execution.captured.kernels import moves

    moves.move(table, slots, wide, tiles, aligned)
