"""Slow truths in float64: attention as explicit T×T matrices, one definition a line, nothing shared with us."""

import math

import torch


def attention_weights(query, key, tokens, *, scale, sliding_window=None, softcap=None):
    """q (B, H, T, D), k (B, G, T, D), tokens (B, T) → softmax weights (B, H, T, T); rows of padding are zero."""
    batch, heads, length, _ = query.shape
    weights = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // key.shape[1])
            for t in range(length):
                seen = visible(tokens[b], t, sliding_window)
                if not tokens[b, t]:
                    continue
                logits = key[b, group, seen].double() @ query[b, h, t].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights[b, h, t, seen] = torch.softmax(logits, dim=0)
    return weights


def visible(tokens, t, sliding_window=None):
    """Positions that query t of a row sees: tokens, not later than itself, within the window."""
    first = 0 if sliding_window is None else max(0, t - sliding_window + 1)
    return [j for j in range(first, t + 1) if tokens[j]]


def entropy_of(weights, tokens, *, window=None, sliding_window=None):
    """Weights (B, H, T, T) → mean over the last `window` tokens of −Σ p log p / log n, (B, H); 0 where n = 1."""
    batch, heads = weights.shape[:2]
    result = torch.zeros(batch, heads, dtype=torch.float64)
    for b in range(batch):
        queries = [t for t in range(len(tokens[b])) if tokens[b, t]]
        queries = queries if window is None else queries[-window:]
        for h in range(heads):
            for t in queries:
                n = len(visible(tokens[b], t, sliding_window))
                if n > 1:
                    p = weights[b, h, t].double()
                    p = p[p > 0]
                    result[b, h] += float(-(p * p.log()).sum()) / math.log(n) / len(queries)
    return result


def head_norms(outputs, tokens):
    """Output-projection inputs (B, T, H, D) → mean over tokens of each head's L2 norm, (B, H)."""
    rows = []
    for row, own in zip(outputs, tokens, strict=True):
        rows.append(torch.stack([x.double().pow(2).sum(-1).sqrt() for x in row[own.bool()]]).mean(0))
    return torch.stack(rows)


def sliding_windows(config):
    """Keys visible to a query in each layer, by the model's own config; None where all are."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
