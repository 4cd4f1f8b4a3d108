"""Which queries of a prompt an entropy is taken over, and which keys each of them sees."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # queries at a time: the largest tensor of an entropy is (B, H, BLOCK, Tk)


class Queries:
    """Which queries count, of prompts `tokens` (B, T), true at tokens: the last `window` of each row, None for all.

    Made once per prompt and used at every site: finding the queries waits for the device, which costs too
    much when every layer does it, and what they see is the same in all layers.
    """

    def __init__(self, tokens: Tensor, window: int | None = 64) -> None:
        self.tokens = tokens.bool()
        from_end = self.tokens.flip(1).cumsum(1).flip(1)  # 1 at a row's last token, counting backwards
        self.counted = self.tokens & (from_end <= window) if window is not None else self.tokens
        self.columns = self.counted.any(0).nonzero().flatten()
        self.count = self.counted.sum(1).clamp(min=1)[:, None]  # (B, 1)
        self._visibility: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._biases: dict[Any, Tensor] = {}
        ends = self.columns[[0, -1]].tolist() if len(self.columns) else [0, -1]
        self._first = ends[0] if ends[1] - ends[0] + 1 == len(self.columns) else None

    @property
    def few(self) -> bool:
        """Whether all of them make one block."""
        return len(self.columns) <= BLOCK

    def take(self, query: Tensor, block: Tensor) -> Tensor:
        """Of queries (B, H, T, D) those of a block, (B, H, b, D); a view where they all stand in a row."""
        if self.few and self._first is not None:
            return query[:, :, self._first : self._first + len(block)]
        return query[:, :, block]

    def bias(self, sliding_window: int | None, repeats: int, parts: int, dtype: torch.dtype, sites: int = 1) -> Tensor:
        """What to add to the logits of the one block: (sites · S·B, 1, repeats · b, T') for S parts of the keys.

        Parts have equal lengths, so neighbours overlap by a few keys, of which the first does not see its own. Finite,
        so that a part in which nothing is visible gives no NaN but next to no weight.
        """
        case = sliding_window, repeats, parts, dtype, sites
        if case not in self._biases:
            ((_, visible, _),) = self.blocks(sliding_window)
            step = visible.shape[2] // parts
            length = visible.shape[2] - (parts - 1) * step
            overlapping = visible.unfold(2, length, step).permute(2, 0, 1, 3)  # (S, B, b, T')
            place = torch.arange(length, device=visible.device)
            part = torch.arange(parts, device=visible.device)[:, None, None, None]
            hidden = ~(overlapping & ((place < step) | (part == parts - 1))).flatten(0, 1)[:, None]  # (S·B, 1, b, T')
            # Rows of the kernel's bias start at multiples of 16 bytes.
            padded = torch.zeros(*hidden.shape[:-1], -(-length // 8) * 8, dtype=dtype, device=hidden.device)
            padded[..., :length].masked_fill_(hidden, torch.finfo(dtype).min / 4)
            self._biases[case] = padded.repeat(sites, 1, repeats, 1)[..., :length]
        return self._biases[case]

    def blocks(self, sliding_window: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """At most BLOCK queries (b,) at a time, the keys they see (B, b, T) and the weight of their entropy (B, b)."""
        if len(self.columns) > BLOCK:  # too much to keep
            for block in self.columns.split(BLOCK):
                yield block, *self._visible(block, sliding_window)
            return
        if sliding_window not in self._visibility:
            self._visibility[sliding_window] = self._visible(self.columns, sliding_window)
        yield self.columns, *self._visibility[sliding_window]

    def _visible(self, block: Tensor, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        visible = (positions <= block[:, None])[None] & self.tokens[:, None]  # (B, b, T)
        if sliding_window is not None:
            visible = visible & (block[:, None] - positions < sliding_window)
        n = visible.sum(-1)
        return visible, (self.counted[:, block] & (n > 1)) / n.clamp(min=2).log()
