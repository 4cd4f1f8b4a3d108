"""A decoder whose layers differ in their head counts: `per_layer_config` in config.json.

The stock classes of transformers do everything; only the attention of each layer is made from that layer's config.
Needs transformers 5.14 or later, torch and nothing else.
"""

from typing import Any

from transformers import LlamaForCausalLM as StockForCausalLM
from transformers import LlamaModel as StockModel


def set_head_counts(decoder: Any, config: Any) -> None:
    """Make each layer's attention anew, in the sizes of the layer's config; weights are loaded afterwards."""
    if not getattr(config, "is_heterogeneous", False):
        raise ImportError("config.json has no per_layer_config, or this transformers is older than 5.14; upgrade it")
    for index, layer in enumerate(decoder.layers):
        attention = type(layer.self_attn)(config.per_layer_config[index], index)
        attention.config = config  # one config for all layers: set_attn_implementation reaches this one only
        layer.self_attn = attention


class MicrogliaModel(StockModel):
    """The decoder without its head, which AutoModel loads."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        set_head_counts(self, config)


class MicrogliaForCausalLM(StockForCausalLM):
    """The language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        set_head_counts(self.model, config)
