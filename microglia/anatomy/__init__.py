"""Where everything lives in a Hugging Face model: layers, projections, head geometry, sizes."""

from microglia.anatomy.anatomy import Anatomy, Layer, causal_lm, context_length, input_device, token_rows
from microglia.anatomy.attention import View, replaced_attention, stock_attention, with_attention
from microglia.anatomy.computation import Computation, LayerComputation, Norm, Projection, computation
from microglia.anatomy.families import FAMILIES, Family
from microglia.anatomy.geometry import HeadGeometry, RowShape
from microglia.anatomy.head import headless, logits_of
from microglia.anatomy.layouts import Fused, FusedEqual, Mlp, Separate
from microglia.anatomy.rereading import never_reread, rope_types
from microglia.anatomy.swap import swap

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Computation",
    "Family",
    "Fused",
    "FusedEqual",
    "HeadGeometry",
    "Layer",
    "LayerComputation",
    "Mlp",
    "Norm",
    "Projection",
    "RowShape",
    "Separate",
    "View",
    "causal_lm",
    "computation",
    "context_length",
    "headless",
    "input_device",
    "logits_of",
    "never_reread",
    "replaced_attention",
    "rope_types",
    "stock_attention",
    "swap",
    "token_rows",
    "with_attention",
]
