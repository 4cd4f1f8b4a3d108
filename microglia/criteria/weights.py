"""Each head's own part of the projections, the same for every family."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.anatomy import HeadGeometry
from microglia.anatomy.projection import float_weight, oriented, sliced
from microglia.units import ChannelSite, HeadSite, ProjectedSite


@dataclass(frozen=True)
class HeadWeights:
    """q (H, D, in), k and v (G, D, in), o (H, D, out) of one site."""

    geometry: HeadGeometry
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def sums(self) -> Tensor:
        """The sum of everything that is the head's own, (H,). A group's k and v count for its query heads equally."""
        per_group = self.geometry.queries_per_group
        shared = (self.k.sum((1, 2)) + self.v.sum((1, 2))) / per_group  # (G,)
        return self.q.sum((1, 2)) + self.o.sum((1, 2)) + shared.repeat_interleave(per_group)


def matrices(site: HeadSite) -> dict[str, Tensor]:
    """Every projection's weight (out, in) by name; copies, with LoRA added.

    Raises MicrogliaError for weights that are stored packed or quantised.
    """
    device = next(site.output.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # accelerate brings offloaded weights to it
    g, weights = site.geometry, {}
    layout = site.layer.family.attention
    for cut in layout.cuts(g, torch.arange(g.heads, device=device), torch.arange(g.kv_heads, device=device)):
        projection = sliced(getattr(site.attention, cut.projection), cut, f"{site.name}.{cut.projection}", g.head_dim)
        weights[cut.projection] = oriented(projection).detach().float()
    return weights


def by_head(site: HeadSite, values: Mapping[str, Tensor]) -> HeadWeights:
    """Matrices (out, in) by the projection's name, weights or anything of their shape, taken apart by head."""
    g, layout = site.geometry, site.layer.family.attention
    inputs = torch.cat([values[name] for name in layout.projections if name != layout.o])
    q, k, v = inputs.split([g.width, g.kv_width, g.kv_width])  # fused or not, they come in this order
    return HeadWeights(
        g,
        q.unflatten(0, (g.heads, g.head_dim)),
        k.unflatten(0, (g.kv_heads, g.head_dim)),
        v.unflatten(0, (g.kv_heads, g.head_dim)),
        values[layout.o].T.unflatten(0, (g.heads, g.head_dim)),
    )


def output_columns(site: ProjectedSite) -> Tensor:
    """What of the output projection belongs to every unit, (U, D, out), in float32."""
    return site.split(float_weight(site.output)).permute(1, 2, 0)


def channel_squares(site: ChannelSite) -> Tensor:
    """The sum of squares of everything that is a block's own, rows and columns, (U,)."""
    up = torch.cat([float_weight(getattr(site.holder, name)) for name in site.projections[:-1]])
    per_channel = up.square().sum(1).unflatten(0, (-1, site.geometry.channels)).sum(0)  # gate and up, packed or not
    return site.split(per_channel).sum(-1) + output_columns(site).square().sum((1, 2))


def head_weights(site: HeadSite) -> HeadWeights:
    """The site's weights by head."""
    return by_head(site, matrices(site))
