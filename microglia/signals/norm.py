"""Activation norm: how much each head writes, on average over the prompt."""

import torch
from torch import Tensor


def mean_norm(outputs: Tensor, tokens: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over prompt tokens of the L2 norm of each head's output.

    `outputs` (B, T, H, D); `tokens` (B, T), true at prompt tokens (not at padding). `count` (B, 1) says how many they
    are; who asks at many sites finds it once, and gives tokens as float32. Returns (B, H) in float32.
    """
    # Half precision is summed in float32 without a copy of the outputs; float64 stays and is rounded at the end.
    exact = torch.promote_types(outputs.dtype, torch.float32)
    norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=exact).float()  # (B, T, H)
    weight = tokens.to(norms.dtype)
    return (norms * weight[..., None]).sum(1) / (token_count(weight) if count is None else count)


def token_count(tokens: Tensor) -> Tensor:
    """Prompt tokens of each row, at least 1: (B, T) → (B, 1)."""
    return tokens.sum(1, keepdim=True).clamp(min=1)
