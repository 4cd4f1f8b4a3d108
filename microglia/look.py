"""Look at a prompt while the model reads it: per-head signals of every site, from one dense forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.errors import ConfigError
from microglia.signals import Queries, attention_entropy, mean_norm, token_count
from microglia.signals.entropy import Glance, by_kernel, entropies, glance
from microglia.sites import Site, replaced_attention, stock_attention

NORMS = ("head", "hidden")


@dataclass(frozen=True)
class Look:
    """What to look at.

    norm: `head` is the norm of the head's own output. `hidden` is the original project's: norms of H equal slices of
        the attention layer's output in the residual stream, which are not heads; for comparison only.
    window: entropy over the last so many prompt queries, None for all.
    """

    norm: str = "head"
    window: int | None = 64

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ConfigError(f"norm={self.norm!r} is unknown; choose head or hidden")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window} was given; it must be at least 1, or None for all prompt queries")


@dataclass
class Seen:
    """Signals (B, H) by name, and each head's mean output over the prompt (B, H, D), of one site.

    glance: what becomes the entropy when the whole prompt was seen.
    """

    signals: dict[str, Tensor]
    mean_output: Tensor | None = None
    glance: Glance | None = None


@contextmanager
def watched(
    sites: Sequence[Site],
    tokens: Tensor,
    look: Look,
    *,
    entropy: bool = True,
    mean_outputs: bool = False,
    on_site: Callable[[int, dict[str, Tensor]], Tensor | None] | None = None,
) -> Iterator[list[Seen]]:
    """Gather signals from the one forward pass made inside. The list it yields holds one `Seen` per site.

    `tokens` (B, T) is true at prompt tokens. `entropy` says whether anybody wants it. `on_site(index, signals)` is
    called when a site has been seen and before its output projection; what it returns (a keep (B, H) or None) gates
    this very pass.
    """
    seen = [Seen({}) for _ in sites]
    weight = tokens.float()
    count = token_count(weight)
    queries = Queries(tokens, look.window)
    with ExitStack() as stack:
        for site, entry in zip(sites, seen, strict=True):
            if entropy:
                watching = _with_entropy(site, entry, queries, now=on_site is not None)
                stack.enter_context(replaced_attention(site, watching))
            hook = _output_hook(site, entry, weight, count, look, mean_outputs, on_site)
            stack.callback(site.output.register_forward_pre_hook(hook).remove)
            if look.norm == "hidden":
                stack.callback(site.output.register_forward_hook(_hidden_norm_hook(site, entry, weight, count)).remove)
        yield seen
        _finish(seen)


def _finish(seen: Sequence[Seen]) -> None:
    """Glances → entropies, all sites of a kind together: one by one they would be many small kernels."""
    kinds: dict[Any, list[Seen]] = {}
    for entry in seen:
        if entry.glance is not None:
            kinds.setdefault(entry.glance.kind, []).append(entry)
    with torch.no_grad():
        for alike in kinds.values():
            found = entropies([entry.glance for entry in alike if entry.glance is not None])
            for entry, entropy in zip(alike, found, strict=True):
                entry.signals["entropy"], entry.glance = entropy, None


def _with_entropy(site: Site, entry: Seen, queries: Queries, *, now: bool) -> Callable[..., Any]:
    stock = stock_attention(site.attention)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        sliding, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        own = key[:, :, : query.shape[2]]  # a static cache returns its empty places too
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            if not now and queries.few and by_kernel(query, softcap):
                entry.glance = glance(query, own, queries, scale=scale, sliding_window=sliding)
            else:
                entry.signals["entropy"] = attention_entropy(
                    query, own, queries, scale=scale, sliding_window=sliding, softcap=softcap
                )
        return stock(module, query, key, value, mask, **kwargs)

    return attention


def _output_hook(
    site: Site,
    entry: Seen,
    tokens: Tensor,
    count: Tensor,
    look: Look,
    mean_outputs: bool,
    on_site: Callable[[int, dict[str, Tensor]], Tensor | None] | None,
) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        heads = site.geometry.split(inputs[0])  # (B, T, H, D)
        with torch.no_grad():
            if look.norm == "head":
                entry.signals["norm"] = mean_norm(heads, tokens, count)
            if mean_outputs:
                weight = tokens.to(heads.dtype)
                weight = weight / weight.sum(1, keepdim=True)
                entry.mean_output = torch.einsum("bthd,bt->bhd", heads, weight)
        keep = on_site(site.index, entry.signals) if on_site else None
        if keep is None:
            return None
        return ((heads * keep[:, None, :, None].to(heads.dtype)).flatten(-2), *inputs[1:])

    return hook


def _hidden_norm_hook(site: Site, entry: Seen, tokens: Tensor, count: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.shape[-1] % site.geometry.heads:
            raise ConfigError(
                f"norm='hidden' slices the {output.shape[-1]} hidden values into {site.geometry.heads} equal "
                "pieces, which is not possible here; use norm='head'"
            )
        with torch.no_grad():
            entry.signals["norm"] = mean_norm(output.unflatten(-1, (site.geometry.heads, -1)), tokens, count)

    return hook
