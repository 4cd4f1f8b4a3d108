"""Attention entropy: how widely each head looks, from queries and keys, in blocks, never as a T×T matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64  # queries at a time: the largest tensor is (B, H, BLOCK, Tk)


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
    fused = query.is_cuda and softcap is None and query.shape[-1] % 8 == 0
    total = torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
    keys = None if fused else key.float().transpose(-1, -2)  # (B, G, D, T)
    for block, visible, weight in queries.blocks(sliding_window):
        q = query[:, :, block]
        entropy = by_mean_key(q, key, visible, scale) if keys is None else by_logits(q, keys, visible, scale, softcap)
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


def by_mean_key(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same without ever writing the logits down, for a GPU: `H = lse - scale · q · k̄`.

    k̄ is the attention-weighted mean of the keys (B, G, T, D): one attention of the queries in which keys are values,
    by the kernel that also returns the logsumexp. A row without visible keys (padding) gives 0.
    """
    batch, heads, count, size = query.shape
    groups, length = key.shape[1:3]
    grouped = query.reshape(batch, groups, -1, size)  # (B, G, H/G · b, D): every key is read once per group
    seen = visible | ~visible.any(-1, keepdim=True)
    # (B, 1, H/G · b, T), for all groups; its rows must start at multiples of 16 bytes.
    bias = query.new_zeros(batch, 1, heads // groups, count, -(-length // 8) * 8)[..., :length]
    bias = bias.masked_fill_(~seen[:, None, None], float("-inf")).flatten(2, 3).expand(-1, groups, -1, -1)
    if query.is_cuda:
        mean, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            grouped, key, key, bias, True, 0.0, False, scale=scale
        )
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            grouped, key, key, 0.0, False, attn_mask=bias, scale=scale
        )
    lse = lse[..., : grouped.shape[2]].float()  # the kernel pads it
    entropy = lse - scale * (grouped.float() * mean.float()).sum(-1)
    return torch.where(visible.any(-1)[:, None], entropy.reshape(batch, heads, count), 0.0)
