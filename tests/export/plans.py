"""A keep plan for any tiny model."""

import torch

from microglia.export import KeepPlan
from tests.tiny import geometries_of


def uneven_plan(model) -> KeepPlan:
    """Other heads and another number of them in each site; rectangular in groups of two."""
    grouped = geometries_of(model)[0].kv_heads == 4
    heads = ([2, 4, 7], [0, 1]) if grouped else ([0, 3, 4, 6, 7], [2])
    keep = tuple(torch.zeros(8).index_fill(0, torch.tensor(h), 1.0) for h in heads)
    return KeepPlan("mean", keep, prompts=5, threshold=0.0, adaptive_keep_ratio=0.4)
