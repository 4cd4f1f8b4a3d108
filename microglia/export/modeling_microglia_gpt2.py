"""GPT-2 whose layers differ in their head counts: `per_layer_config` in config.json.

The stock classes of transformers do everything; only the two projections of each attention are made in other sizes.
Needs transformers 5.14 or later, torch and nothing else.
"""

from typing import Any

from transformers import GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D


def set_head_counts(decoder: Any, config: Any) -> None:
    """Make each layer's projections anew, in the sizes of the layer's config; weights are loaded afterwards."""
    if not getattr(config, "is_heterogeneous", False):
        raise ImportError("config.json has no per_layer_config, or this transformers is older than 5.14; upgrade it")
    for index, block in enumerate(decoder.h):
        attention, heads = block.attn, config.per_layer_config[index].num_attention_heads
        width = heads * attention.head_dim
        attention.c_attn, attention.c_proj = Conv1D(3 * width, config.hidden_size), Conv1D(config.hidden_size, width)
        attention.num_heads, attention.split_size = heads, width


class MicrogliaModel(GPT2Model):
    """The decoder without its head, which AutoModel loads."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        set_head_counts(self, config)


class MicrogliaForCausalLM(GPT2LMHeadModel):
    """The language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        set_head_counts(self.transformer, config)
