"""Attention entropy: how widely each head looks, from queries and keys, in blocks, never as a T×T matrix."""

import torch
from torch import Tensor

BLOCK = 64  # queries at a time: the largest tensor is (B, H, BLOCK, Tk)


def attention_entropy(
    query: Tensor,
    key: Tensor,
    tokens: Tensor,
    *,
    scale: float,
    window: int | None = 64,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean normalised entropy of causal attention over the last `window` prompt queries of each row.

    For a query with n visible keys and logits s: `H = (logsumexp(s) - sum(p·s)) / log(n)`, in [0, 1]; 0 when n = 1.
    With s = scale·q·kᵀ the second term is `scale · q · k̄` for the attention-weighted mean key k̄.

    Args:
        query: (B, H, T, D), after rotary embedding. key: (B, G, T, D), H a multiple of G.
        tokens: (B, T), true at prompt tokens; padding may stand on either side.
        scale: factor of the dot product. window: number of queries per row, None for all.
        sliding_window: keys visible to a query, itself included. softcap: `s = c·tanh(s/c)` (Gemma 2).

    Returns (B, H) in float32.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    tokens = tokens.bool()
    from_end = tokens.flip(1).cumsum(1).flip(1)  # 1 at a row's last token, counting backwards
    counted = tokens & (from_end <= window) if window is not None else tokens
    columns = counted.any(0).nonzero().flatten()
    keys = key.float().transpose(-1, -2)  # (B, G, D, T)
    positions = torch.arange(length, device=query.device)

    total = torch.zeros(batch, heads, dtype=torch.float32, device=query.device)
    for block in columns.split(BLOCK):
        q = query[:, :, block].float().reshape(batch, groups, -1, size)  # a group's queries in a row
        logits = ((q @ keys) * scale).view(batch, heads, len(block), length)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        visible = (positions <= block[:, None])[None] & tokens[:, None]  # (B, block, T)
        if sliding_window is not None:
            visible = visible & (block[:, None] - positions < sliding_window)
        # A large finite value, not -inf: p is exactly 0 there and 0 · finite stays 0.
        logits = logits.masked_fill(~visible[:, None], -1e30)
        lse = logits.logsumexp(-1)
        entropy = lse - ((logits - lse[..., None]).exp() * logits).sum(-1)  # (B, H, block)
        n = visible.sum(-1)
        weight = (counted[:, block] & (n > 1)) / n.clamp(min=2).log()
        total += (entropy.clamp(min=0) * weight[:, None]).sum(-1)
    return total / counted.sum(1).clamp(min=1)[:, None]
