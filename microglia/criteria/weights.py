"""Each head's own part of the projections, the same for every family."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.compact import sliced
from microglia.sites import Site


@dataclass(frozen=True)
class HeadWeights:
    """q (H, D, in), k and v (G, D, in), o (H, D, out) of one site; copies, with LoRA added."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def head_weights(site: Site) -> HeadWeights:
    """The site's weights by head. Raises MicrogliaError for weights that are stored packed or quantised."""
    g = site.geometry
    inputs, output, device = [], torch.empty(0), next(site.output.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # accelerate brings offloaded weights to it
    heads, groups = torch.arange(g.heads, device=device), torch.arange(g.kv_heads, device=device)
    for cut in site.layout.cuts(g, heads, groups):
        projection = sliced(getattr(site.attention, cut.projection), cut, f"{site.name}.{cut.projection}", g.head_dim)
        weight: Tensor = projection.weight.float()  # type: ignore[operator, assignment]
        weight = weight.T if hasattr(projection, "nf") else weight  # GPT-2's Conv1D: (in, out)
        if cut.of_inputs:
            output = weight.T
        else:
            inputs.append(weight)
    q, k, v = torch.cat(inputs).split([g.width, g.kv_width, g.kv_width])  # one layout fuses them, in this order
    by_head, by_group = (-1, g.head_dim, q.shape[-1]), (g.kv_heads, g.head_dim, q.shape[-1])
    return HeadWeights(q.reshape(by_head), k.reshape(by_group), v.reshape(by_group), output.unflatten(0, (g.heads, -1)))
