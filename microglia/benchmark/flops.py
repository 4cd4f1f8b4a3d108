"""Floating-point operations, counted analytically: linear layers and the two products of attention, 2 per multiply-add.

Analytically, because torch's counter sees no operations in scaled-dot-product attention on a CPU and counts a causal
one as if every query saw every key.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microglia.benchmark.pattern import is_shared, kept_counts, kept_shares
from microglia.sites import Site
from microglia.sites.layouts import plain


def linear_flops(module: nn.Module) -> int:
    """Operations of all linear layers for one token."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))


def prefill_flops(lm: Any, sites: Sequence[Site], *, batch: int, context: int, windows: Sequence[int | None]) -> int:
    """Operations of reading `batch` prompts of `context` tokens, with logits for the last one only.

    `windows` holds the sliding window of every site, None for full attention. Pruning does not change this number.
    """
    head = linear_flops(lm.get_output_embeddings())
    total = context * (linear_flops(lm) - head) + head
    for site, window in zip(sites, windows, strict=True):
        seen = torch.arange(1, context + 1).clamp(max=window or context)
        total += 4 * site.geometry.width * int(seen.sum())
    return batch * total


def step_flops(
    lm: Any, sites: Sequence[Site], *, batch: int, keys: Sequence[int], keep: Sequence[Tensor] | None = None
) -> int:
    """Operations of one decode step in which site i sees `keys[i]` keys; after compaction to `keep` (B, H) if given."""
    total = linear_flops(lm)
    for index, (site, seen) in enumerate(zip(sites, keys, strict=True)):
        heads = site.geometry.heads
        if keep is not None:
            heads, _ = kept_counts(site, keep[index])
            if is_shared(keep):
                for projection, kept, whole, _ in kept_shares(site, keep[index]):
                    inner: Any = plain(projection)
                    total -= 2 * inner.weight.numel() * (whole - kept) // whole
        total += 4 * heads * site.geometry.head_dim * seen
    return batch * total
