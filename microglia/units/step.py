"""What a decode step of a model reads: every weight that a product needs, at its stored width, and keys and values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, causal_lm
from microglia.anatomy.projection import tensor_bytes
from microglia.errors import check_range
from microglia.units.costs import StepCosts, UnitCosts
from microglia.units.site import Site
from microglia.units.sublayer import HALVES

CONTEXT = 512  # tokens in the cache of a step, unless something else is asked for


def dense_weight_bytes(lm: Any, rows: int = 1) -> int:
    """Bytes of weights that one decode step of `rows` rows reads: all, but of an untied embedding one line a row."""
    parameters: dict[int, Tensor] = {id(p): p for p in lm.parameters()}
    table = lm.get_input_embeddings().weight
    head = lm.get_output_embeddings()
    total = sum(tensor_bytes(p) for p in parameters.values())
    if head is not None and head.weight is table:
        return total
    return total - tensor_bytes(table) + rows * tensor_bytes(table) // len(table)


def layer_kv_bytes(anatomy: Anatomy, batch: int, context: int) -> list[int]:
    """Bytes of keys and values that every layer reads for `batch` rows of `context` tokens."""
    width: int = torch.empty(0, dtype=anatomy.lm.dtype).element_size()
    seen = [min(context, (window or context + 1) - 1) for window in anatomy.windows]  # besides the step's own token
    return [
        2 * width * batch * tokens * layer.heads.kv_width for layer, tokens in zip(anatomy.layers, seen, strict=True)
    ]


def step_costs(model: nn.Module, sites: Sequence[Site], *, batch: int = 1, context: int = CONTEXT) -> StepCosts:
    """Bytes of a decode step of `batch` rows with `context` tokens each: of every unit, and of all that stays.

    Nothing is counted twice: of a sublayer, its unit costs what none of its heads or channels does. The output head is
    among what stays.
    """
    check_range("batch", batch, 1, 2**31 - 1)
    check_range("context", context, 0, 2**31 - 1)
    anatomy = Anatomy(causal_lm(model))
    kv = layer_kv_bytes(anatomy, batch, context)
    places = {layer.index: place for place, layer in enumerate(anatomy.layers)}
    own = [site.costs(kv[places[site.layer.index]]) for site in sites]
    within = {(site.layer.index, site.unit): cost.whole for site, cost in zip(sites, own, strict=True)}
    for site in (site for site in sites if site.unit == "sublayer"):
        inside = [within.get((site.layer.index, unit), 0.0) for unit in HALVES]
        own[site.index] = UnitCosts.of_units(own[site.index].units - torch.tensor(inside, dtype=torch.float64))
    fixed = dense_weight_bytes(anatomy.lm, batch) + sum(kv) - sum(cost.whole for cost in own)
    return StepCosts(own, fixed, batch, context)
