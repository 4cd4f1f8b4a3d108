"""What reading and writing cost, by counting: bytes that a step reads, and floating-point operations.

Operations of linear layers and of the two products of attention, 2 per multiply-add. Analytically, because torch's
counter sees no operations in scaled-dot-product attention on a CPU and counts a causal one as if every query saw every
key. What pruning saves is the sites' to say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microglia.anatomy import Anatomy
from microglia.anatomy.projection import linear_flops
from microglia.units import Site, dense_weight_bytes, gone
from microglia.units.kv import kv_bytes, layer_bytes


@dataclass(frozen=True)
class Costs:
    """What a decode step reads and computes, and a prefill computes."""

    weight_bytes: int
    kv_bytes: int
    prefill_flops: int
    step_flops: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def costs(
    lm: Any, cache: Any, *, batch: int, context: int, sites: Sequence[Site] = (), keep: Sequence[Tensor] = ()
) -> Costs:
    """Of prompts that were read into the dense `cache`; after `sites` are cut to `keep` (B, U), if given."""
    anatomy = Anatomy(lm)
    return Costs(
        weight_bytes(lm, sites, keep, rows=batch),
        kept_kv_bytes(cache, sites, keep),
        prefill_flops(anatomy, batch=batch, context=context),
        step_flops(anatomy, sites, keep, batch=batch, context=context),
    )


def weight_bytes(lm: Any, sites: Sequence[Site] = (), keep: Sequence[Tensor] = (), *, rows: int = 1) -> int:
    """Bytes of weights that one decode step of `rows` rows reads, after `sites` are cut to `keep` (B, U), if given."""
    return dense_weight_bytes(lm, rows) - _saved(sites, keep, "saved_bytes")


def kept_kv_bytes(cache: Any, sites: Sequence[Site], keep: Sequence[Tensor]) -> int:
    """Bytes that a dense cache is left with after compaction to `keep` (B, U)."""
    total = kv_bytes(cache)
    for site, k in _own(sites, keep):
        total -= round(layer_bytes(cache.layers[site.layer.index]) * (1 - site.kv_share(k)))
    return total


def prefill_flops(anatomy: Anatomy, *, batch: int, context: int) -> int:
    """Operations of reading `batch` prompts of `context` tokens, with logits for the last one only.

    Pruning does not change this number.
    """
    head = linear_flops(anatomy.lm.get_output_embeddings())
    total = context * (linear_flops(anatomy.lm) - head) + head
    for layer, window in zip(anatomy.layers, anatomy.windows, strict=True):
        keys = torch.arange(1, context + 1).clamp(max=window or context)
        total += 4 * layer.heads.width * int(keys.sum())
    return batch * total


def step_flops(
    anatomy: Anatomy, sites: Sequence[Site] = (), keep: Sequence[Tensor] = (), *, batch: int, context: int
) -> int:
    """Operations of the first decode step after prompts of `context` tokens; `sites` cut to `keep` (B, U), if given."""
    keys = [min(context + 1, window or context + 1) for window in anatomy.windows]
    total = linear_flops(anatomy.lm) - _saved(sites, keep, "saved_flops")
    total += sum(4 * layer.heads.width * count for layer, count in zip(anatomy.layers, keys, strict=True))
    for site, k in _own(sites, keep):
        total -= 4 * (site.attended_width() - site.attended_width(k)) * keys[site.layer.index]
    return batch * total


def _saved(sites: Sequence[Site], keep: Sequence[Tensor], saved: str) -> int:
    """What cut weights save at all sites, as far as rows share them."""
    return sum(getattr(site, saved)(site.read_by(k)) for site, k in _own(sites, keep))


def _own(sites: Sequence[Site], keep: Sequence[Tensor]) -> Iterator[tuple[Site, Tensor]]:
    """The sites that save something themselves: what is gone with its sublayer is counted there."""
    for site, k in zip(sites, keep, strict=True):
        if not gone(site, k):
            yield site, k
