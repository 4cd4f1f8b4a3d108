"""Models of every family with layers enough to lose sublayers, and decisions about all kinds of units."""

import torch

from microglia.gate import Gate
from microglia.pruner import Pruner
from microglia.units import Arrangement, find_sites
from tests.tiny import Fixed, tiny_model

KINDS = ("head", "channel", "sublayer")
LAYERS = 5


def deep_model(family, **changes):
    """Five layers; the first that attends to everything is one that may go, where a family has two kinds of them."""
    kinds = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2}
    more = kinds if family in ("gemma2", "gemma3_text") else {}
    return tiny_model(family, num_hidden_layers=LAYERS, **more, **changes)


def shuffled(model, seed=5, **parts):
    """An arrangement with the channels of every layer in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model, ("channel",))
    return Arrangement([torch.randperm(s.geometry.channels, generator=generator) for s in sites], **parts)


def some(model, rows=1, units=KINDS, seed=7, arrangement=None, **parts):
    """A pruner with random decisions, of one row for all prompts or of as many rows as prompts.

    Of the sublayers that may go, attention goes in layer 2 and the MLP in layer 3, in every second row.
    """
    arrangement = arrangement or shuffled(model)
    generator, logits = torch.Generator().manual_seed(seed), []
    for site in find_sites(model, units, arrangement):
        x = torch.rand(rows, site.geometry.count, generator=generator) - 0.5
        if site.unit == "sublayer":
            x = x.abs() + 0.1
            if site.layer.index in (2, 3):
                x[::2, site.layer.index - 2] *= -1
        logits.append(x)
    policy = Fixed(logits)
    policy.signals = ()
    return Pruner(policy, Gate(bucket=1), units=tuple(units), arrangement=arrangement, **parts)
