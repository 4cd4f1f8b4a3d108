"""Where q, k, v and o live in a Hugging Face model: one `Site` per attention layer."""

from microglia.sites.families import FAMILIES
from microglia.sites.find import causal_lm, check_head_count, find_sites, input_device
from microglia.sites.layouts import Fused, Separate
from microglia.sites.site import Site, View, replaced_attention, stock_attention, with_attention

__all__ = [
    "FAMILIES",
    "Fused",
    "Separate",
    "Site",
    "View",
    "causal_lm",
    "check_head_count",
    "find_sites",
    "input_device",
    "replaced_attention",
    "stock_attention",
    "with_attention",
]
