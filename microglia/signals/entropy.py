"""Attention entropy: how widely each head looks, from queries and keys, in blocks, never as a T×T matrix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # queries at a time: the largest tensor is (B, H, BLOCK, Tk)
PARTS, PART = 8, 256  # keys go to the kernel in at most so many parts, of at least so many


class Queries:
    """Which queries count, of prompts `tokens` (B, T), true at tokens: the last `window` of each row, None for all.

    Made once per prompt and used at every site: finding the queries waits for the device, which is dear when every
    layer does it, and what they see is the same in all layers.
    """

    def __init__(self, tokens: Tensor, window: int | None = 64) -> None:
        self.tokens = tokens.bool()
        from_end = self.tokens.flip(1).cumsum(1).flip(1)  # 1 at a row's last token, counting backwards
        self.counted = self.tokens & (from_end <= window) if window is not None else self.tokens
        self.columns = self.counted.any(0).nonzero().flatten()
        self.count = self.counted.sum(1).clamp(min=1)[:, None]  # (B, 1)
        self._seen: dict[int | None, tuple[Tensor, Tensor]] = {}
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

    def bias(self, sliding_window: int | None, repeats: int, parts: int, dtype: torch.dtype) -> Tensor:
        """What to add to the logits of the one block: (S·B, 1, repeats · b, T') for S parts of the keys.

        Parts have equal lengths, so neighbours overlap by a few keys, of which the first does not see its own. Finite,
        so that a part in which nothing is visible gives no NaN but next to no weight.
        """
        case = sliding_window, repeats, parts, dtype
        if case not in self._biases:
            ((_, visible, _),) = self.blocks(sliding_window)
            step = visible.shape[2] // parts
            length = visible.shape[2] - (parts - 1) * step
            seen = visible.unfold(2, length, step).permute(2, 0, 1, 3)  # (S, B, b, T')
            place = torch.arange(length, device=visible.device)
            part = torch.arange(parts, device=visible.device)[:, None, None, None]
            seen = (seen & ((place < step) | (part == parts - 1))).flatten(0, 1)[:, None]  # (S·B, 1, b, T')
            # Rows of the kernel's bias start at multiples of 16 bytes.
            room = torch.zeros(*seen.shape[:-1], -(-length // 8) * 8, dtype=dtype, device=seen.device)
            room[..., :length].masked_fill_(~seen, torch.finfo(dtype).min / 4)
            self._biases[case] = room.repeat(1, 1, repeats, 1)[..., :length]
        return self._biases[case]

    def blocks(self, sliding_window: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """At most BLOCK queries (b,) at a time, the keys they see (B, b, T) and the weight of their entropy (B, b)."""
        if len(self.columns) > BLOCK:  # too much to keep
            for block in self.columns.split(BLOCK):
                yield block, *self._visible(block, sliding_window)
            return
        if sliding_window not in self._seen:
            self._seen[sliding_window] = self._visible(self.columns, sliding_window)
        yield self.columns, *self._seen[sliding_window]

    def _visible(self, block: Tensor, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        visible = (positions <= block[:, None])[None] & self.tokens[:, None]  # (B, b, T)
        if sliding_window is not None:
            visible = visible & (block[:, None] - positions < sliding_window)
        n = visible.sum(-1)
        return visible, (self.counted[:, block] & (n > 1)) / n.clamp(min=2).log()


def attention_entropy(
    query: Tensor,
    key: Tensor,
    tokens: Tensor | Queries,
    *,
    scale: float,
    window: int | None = 64,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean normalised entropy of causal attention over the last `window` prompt queries of each row.

    For a query with n visible keys and logits s: `H = (logsumexp(s) - sum(p·s)) / log(n)`, in [0, 1]; 0 when n = 1.

    Args:
        query: (B, H, T, D), after rotary embedding. key: (B, G, T, D), H a multiple of G.
        tokens: (B, T), true at prompt tokens; padding may stand on either side. Or the `Queries` made of it, which
            then say the window too.
        scale: factor of the dot product. window: number of queries per row, None for all.
        sliding_window: keys visible to a query, itself included. softcap: `s = c·tanh(s/c)` (Gemma 2).

    Returns (B, H) in float32.
    """
    queries = tokens if isinstance(tokens, Queries) else Queries(tokens, window)
    if queries.few and by_kernel(query, softcap):
        return entropies([glance(query, key, queries, scale=scale, sliding_window=sliding_window)])[0]
    total = torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
    keys = key.float().transpose(-1, -2)  # (B, G, D, T)
    for block, visible, weight in queries.blocks(sliding_window):
        entropy = by_logits(queries.take(query, block), keys, visible, scale, softcap)
        total += (entropy.clamp(min=0) * weight[:, None]).sum(-1)
    return total / queries.count


def by_logits(query: Tensor, keys: Tensor, visible: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Entropy (B, H, b) in nats of queries (B, H, b, D), from their logits on keys (B, G, D, T) in float32."""
    batch, heads, count, size = query.shape
    grouped = query.float().reshape(batch, keys.shape[1], -1, size)  # a group's queries in a row
    logits = ((grouped @ keys) * scale).view(batch, heads, count, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # A large finite value, not -inf: p is exactly 0 there and 0 · finite stays 0.
    logits = logits.masked_fill(~visible[:, None], -1e30)
    lse = logits.logsumexp(-1)
    return lse - ((logits - lse[..., None]).exp() * logits).sum(-1)


def by_kernel(query: Tensor, softcap: float | None) -> bool:
    """Whether entropies of these queries come from a glance: where there is a kernel that returns the logsumexp."""
    return query.is_cuda and softcap is None and query.shape[-1] % 8 == 0


@dataclass(frozen=True)
class Glance:
    """The last queries' attention at one site, which knows their entropy: `H = lse - scale · q · k̄`.

    k̄ is the attention-weighted mean of the keys: one attention in which keys are values, without writing logits down.
    query (B, G, N, D) with N = H/G · b; mean (S·B, G, N, D) and lse (S·B, G, N) for each of S parts of the keys.
    weight (B, b) and count (B, 1) as in `Queries`. What is left to do is small and done for all sites at once.
    """

    query: Tensor
    mean: Tensor
    lse: Tensor
    scale: float
    weight: Tensor
    count: Tensor

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for glances that can be finished together."""
        return self.query.shape, self.mean.shape, self.scale, id(self.weight)


def glance(query: Tensor, key: Tensor, queries: Queries, *, scale: float, sliding_window: int | None = None) -> Glance:
    """A glance at queries (B, H, T, D) and keys (B, G, T, D); `queries` are at most BLOCK.

    With one prompt the kernel would occupy a block of threads for every head and no more, so the keys go in parts.
    """
    (batch, heads, _, size), (groups, length) = query.shape, key.shape[1:3]
    ((block, _, weight),) = queries.blocks(sliding_window)
    last = queries.take(query, block).contiguous().view(batch, groups, -1, size)  # a key is read once per group
    parts = 1 if batch > 1 else max(1, min(PARTS, length // PART))
    bias = queries.bias(sliding_window, heads // groups, parts, query.dtype).expand(-1, groups, -1, -1)
    keys, asked = key, last
    if parts > 1:
        step = length // parts
        keys = key[0].unfold(1, length - (parts - 1) * step, step).permute(1, 0, 3, 2)  # (S, G, T', D), a view
        asked = last.expand(parts, -1, -1, -1)
    if query.is_cuda:
        mean, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            asked, keys, keys, bias, True, 0.0, False, scale=scale
        )
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asked, keys, keys, 0.0, False, attn_mask=bias, scale=scale
        )
    return Glance(last, mean, lse[..., : last.shape[2]], scale, weight, queries.count)  # the kernel pads lse


def entropies(glances: Sequence[Glance]) -> Tensor:
    """Mean normalised entropies (L, B, H) of L glances of one kind; see `attention_entropy`."""
    first = glances[0]
    query = torch.stack([g.query for g in glances]).float()[:, None]  # (L, 1, B, G, N, D)
    parts = len(first.mean) // len(first.query)
    mean = torch.stack([g.mean for g in glances]).unflatten(1, (parts, -1)).float()
    lse = torch.stack([g.lse for g in glances]).unflatten(1, (parts, -1)).float()
    whole = lse.logsumexp(1)  # (L, B, G, N)
    products = ((lse - whole[:, None]).exp() * (query * mean).sum(-1)).sum(1)
    entropy = (whole - first.scale * products).unflatten(-1, (-1, first.weight.shape[1])).flatten(2, 3)  # (L, B, H, b)
    return (entropy.clamp(min=0) * first.weight[:, None]).sum(-1) / first.count
