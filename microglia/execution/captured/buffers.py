"""The static tensors of one batch size and one length: what captured steps read and write, and never moves."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from microglia.anatomy import Anatomy
from microglia.execution.captured.kv import StaticHeads

CHECK = 16  # steps between two looks at whether all rows have ended: each look waits for the device
END_TOKENS = 64  # places for tokens that end an answer


class StaticBuffers:
    """Tokens, positions, logits, answers and cache of `batch` rows of at most `length` tokens."""

    def __init__(self, anatomy: Anatomy, batch: int, length: int) -> None:
        lm, device = anatomy.lm, anatomy.lm.device
        self.batch, self.length = batch, length
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, dtype=torch.long, device=device)
            geometries = [layer.heads for layer in anatomy.layers]
            self.cache = StaticHeads(geometries, batch, length, dtype=lm.dtype, device=device)
            self.token, self.positions = zeros(batch, 1), zeros(batch, 1)
            self.tokens = torch.ones(batch, length, dtype=torch.bool, device=device)  # false at the prompt's padding
            self.logits = torch.zeros(batch, anatomy.vocab_size, device=device)
            self.answer, self.count = zeros(batch, length), zeros(1)
            self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
            self.stop, self.pad = zeros(END_TOKENS) - 1, zeros(1)

    def clear(self, end_tokens: Sequence[int] = (), pad: int = 0) -> None:
        """Ready for a new prompt; `end_tokens` end an answer, `pad` follows them."""
        self.cache.place.length = 0
        self.stop.fill_(-1)
        self.stop[: len(end_tokens)] = torch.tensor(list(end_tokens), dtype=torch.long)
        self.pad.fill_(pad)
        self.ended.zero_()
        self.count.zero_()

    def prompt_read(self, mask: Tensor) -> None:
        """The prompts of `mask` (B, T), left-padded, have just been read into the cache."""
        length = mask.shape[1]
        self.tokens.fill_(True)
        self.tokens[:, :length] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True))
        self.cache.place.position.fill_(length)
        self.cache.place.length = length

    def choose(self) -> None:
        """The likeliest token of `logits`, unless the row has ended, into `token` and the answer."""
        token = torch.where(self.ended, self.pad, self.logits.argmax(-1))
        self.ended |= (token[:, None] == self.stop).any(-1)
        self.token.copy_(token[:, None])
        self.answer.index_copy_(1, self.count, self.token)
        self.count += 1

    def advance(self) -> None:
        """One place further, as data."""
        self.positions += 1
        self.cache.place.position += 1

    def answers(self, count: int) -> Tensor:
        """The first `count` tokens of every answer, (B, N), no longer than the longest answer."""
        answer = self.answer[:, :count].clone()
        ended = (answer[..., None] == self.stop).any(-1).long().cumsum(1) > 0  # (B, N), from the end token on
        lengths = (~ended).sum(1) + 1
        return answer[:, : min(count, int(lengths.max()))]
