"""Attention entropy: how widely each head looks, from queries and keys, in blocks, never as a T×T matrix."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.anatomy import replaced_attention, stock_attention
from microglia.signals.base import Prompt, Signal
from microglia.signals.queries import Queries
from microglia.units import HeadSite, Site

FEW = 2**23  # elements of a site's keys that may wait for the end of the prompt: of more, the copies count
PARTS, PART = 8, 256  # keys go to the kernel in at most so many parts, of at least so many


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
        return entropies([partial_entropy(query, key, queries, scale=scale, sliding_window=sliding_window)])[0]
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
    """Whether entropies of these queries are made in two parts: where there is a kernel that returns the logsumexp."""
    return query.is_cuda and softcap is None and query.shape[-1] % 8 == 0


@dataclass(frozen=True)
class PartialEntropy:
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
        """Equal for partials that can be finished together."""
        return self.query.shape, self.mean.shape, self.scale, id(self.weight)


def partial_entropy(
    query: Tensor, key: Tensor, queries: Queries, *, scale: float, sliding_window: int | None = None
) -> PartialEntropy:
    """The large part of an entropy: one attention of queries (B, H, T, D) on keys (B, G, T, D), at most BLOCK.

    With one prompt the kernel would occupy a block of threads for every head and no more, so the keys go in parts.
    """
    (batch, _, _, size), (groups, length) = query.shape, key.shape[1:3]
    ((block, _, weight),) = queries.blocks(sliding_window)
    last = queries.take(query, block).contiguous().view(batch, groups, -1, size)  # a key is read once per group
    parts = 1 if batch > 1 else max(1, min(PARTS, length // PART))
    bias = queries.bias(sliding_window, last.shape[2] // len(block), parts, query.dtype).expand(-1, groups, -1, -1)
    keys, repeated = key, last
    if parts > 1:
        step = length // parts
        keys = key[0].unfold(1, length - (parts - 1) * step, step).permute(1, 0, 3, 2)  # (S, G, T', D), a view
        repeated = last.expand(parts, -1, -1, -1)
    mean, lse = _attention(repeated, keys, bias, scale)
    return PartialEntropy(last, mean, lse[..., : last.shape[2]], scale, weight, queries.count)  # the kernel pads lse


def _attention(query: Tensor, keys: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weighted means of keys (B, G, T, D) for queries (B, G, N, D), and logsumexp (B, G, N or padded)."""
    if query.is_cuda:
        mean, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, keys, bias, True, 0.0, False, scale=scale
        )
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, keys, 0.0, False, attn_mask=bias, scale=scale
        )
    return mean, lse


def entropies(partials: Sequence[PartialEntropy]) -> Tensor:
    """Mean normalised entropies (L, B, H) of L partials of one kind; see `attention_entropy`."""
    first = partials[0]
    query = torch.stack([g.query for g in partials])
    parts = len(first.mean) // len(first.query)
    mean = torch.stack([g.mean for g in partials]).unflatten(1, (parts, -1))
    lse = torch.stack([g.lse for g in partials]).unflatten(1, (parts, -1))
    return _joined(query, mean, lse, first)


def _joined(query: Tensor, mean: Tensor, lse: Tensor, like: "PartialEntropy | WaitingEntropy") -> Tensor:
    """Entropies (L, B, H) of query (L, B, G, N, D), mean (L, S, B, G, N, D) and lse (L, S, B, G, N)."""
    query, mean, lse = query.float()[:, None], mean.float(), lse.float()
    whole = lse.logsumexp(1)  # (L, B, G, N)
    products = ((lse - whole[:, None]).exp() * (query * mean).sum(-1)).sum(1)
    entropy = (whole - like.scale * products).unflatten(-1, (-1, like.weight.shape[1])).flatten(2, 3)  # (L, B, H, b)
    mean_entropy: Tensor = (entropy.clamp(min=0) * like.weight[:, None]).sum(-1) / like.count
    return mean_entropy


@dataclass(frozen=True)
class WaitingEntropy:
    """The last queries (B, G, N, D) of one site and its keys (B, G, T, D), which attend when the prompt was read.

    Of all sites together that is one attention; at each of them, the host would launch some more small kernels, and
    reading a short prompt waits for the host.
    """

    query: Tensor
    key: Tensor
    queries: Queries
    scale: float
    sliding_window: int | None

    @property
    def weight(self) -> Tensor:
        """As in `Queries`, (B, b)."""
        ((_, _, weight),) = self.queries.blocks(self.sliding_window)
        return weight

    @property
    def count(self) -> Tensor:
        """As in `Queries`, (B, 1)."""
        return self.queries.count

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for those that attend together."""
        return self.query.shape, self.key.shape, self.query.dtype, self.query.device, self.scale, self.sliding_window


def waiting_entropy(
    query: Tensor, key: Tensor, queries: Queries, *, scale: float, sliding_window: int | None = None
) -> WaitingEntropy:
    """Of queries (B, H, T, D) and keys (B, G, T, D): one copy of the few queries, and nothing else yet."""
    last = queries.take(query.detach(), queries.columns).contiguous()
    return WaitingEntropy(
        last.view(len(last), key.shape[1], -1, last.shape[-1]), key.detach(), queries, scale, sliding_window
    )


def attended(waiting: Sequence[WaitingEntropy]) -> Tensor:
    """Mean normalised entropies (L, B, H) of L sites of one kind; see `attention_entropy`."""
    first, sites = waiting[0], len(waiting)
    query = torch.stack([w.query for w in waiting])  # (L, B, G, N, D)
    keys = torch.stack([w.key for w in waiting]).flatten(0, 1)  # (L·B, G, T, D)
    (_, batch, groups, count, _), b = query.shape, len(first.queries.columns)
    together = sites if batch > 1 else 1  # the bias of one prompt is the same memory for all sites
    bias = first.queries.bias(first.sliding_window, count // b, 1, query.dtype, together)
    mean, lse = _attention(query.flatten(0, 1), keys, bias.expand(sites * batch, groups, -1, -1), first.scale)
    lse = lse[..., :count].unflatten(0, (sites, 1, batch))
    return _joined(query, mean.unflatten(0, (sites, 1, batch)), lse, first)


class Entropy(Signal):
    """How widely a head looks over the prompt, from 0 (one token) to 1 (all alike)."""

    name: ClassVar[str] = "entropy"
    usual: ClassVar[bool] = True
    unit: ClassVar[str] = "head"

    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> AbstractContextManager[object]:
        assert isinstance(site, HeadSite)
        stock = stock_attention(site.attention)
        queries = prompt.queries

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
            sliding, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
            filled = key[:, :, : query.shape[2]]  # a static cache returns its empty places too
            kernel = queries.few and by_kernel(query, softcap)
            if kernel and filled.numel() <= FEW:
                put(waiting_entropy(query, filled, queries, scale=scale, sliding_window=sliding))
                return stock(module, query, key, value, mask, **kwargs)
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                if kernel:
                    put(partial_entropy(query, filled, queries, scale=scale, sliding_window=sliding))
                else:
                    put(attention_entropy(query, filled, queries, scale=scale, sliding_window=sliding, softcap=softcap))
            return stock(module, query, key, value, mask, **kwargs)

        return replaced_attention(site.attention, attention)

    def finish(self, values: Sequence[Any]) -> list[Tensor]:
        """All sites of a kind together: one by one they would be many small kernels."""
        kinds: dict[Any, list[int]] = {}
        for index, value in enumerate(values):
            if isinstance(value, PartialEntropy | WaitingEntropy):
                kinds.setdefault((type(value), value.kind), []).append(index)
        finished = list(values)
        for (kind, _), places in kinds.items():
            alike = [values[index] for index in places]
            with torch.no_grad(), torch.autocast(alike[0].query.device.type, enabled=False):
                together = attended(alike) if kind is WaitingEntropy else entropies(alike)
            for index, entropy in zip(places, together.unbind(), strict=True):
                finished[index] = entropy
        return finished

    def score(self, values: Tensor) -> Tensor:
        """One minus the entropy: focused heads stay."""
        return 1 - values
