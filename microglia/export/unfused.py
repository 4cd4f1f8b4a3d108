"""Phi-3 with its fused projections taken apart is exactly Mistral, which more runtimes know."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import MistralConfig

from microglia.anatomy import Layer
from microglia.errors import UnsupportedModelError

SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings pad_token_id bos_token_id "
    "eos_token_id sliding_window attention_dropout"
).split()


def unfused_config(config: Any, head_dim: int) -> MistralConfig:
    """The Mistral configuration of a Phi-3. Raises UnsupportedModelError for rotary embeddings that Mistral lacks."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"this Phi-3 turns {rope.get('partial_rotary_factor', 1.0):g} of a head with rope_type="
            f"{rope.get('rope_type')!r}, which its Mistral form cannot; export a Phi-3 with plain rotary embeddings "
            "(the 4k variants)"
        )
    return MistralConfig(
        **{name: getattr(config, name) for name in SAME},
        head_dim=head_dim,
        rope_parameters={"rope_theta": rope["rope_theta"], "rope_type": "default"},
    )


def unfused_weights(state: dict[str, Tensor], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """`state` of a Phi-3, its layers cut or not, under Mistral's names."""
    state = dict(state)
    for layer in layers:
        heads, attention, mlp = layer.heads, layer.attention_name, layer.mlp_name
        q, k, v = state.pop(f"{attention}.qkv_proj.weight").split([heads.width, heads.kv_width, heads.kv_width])
        gate, up = state.pop(f"{mlp}.gate_up_proj.weight").chunk(2)
        # Cloned: a part of a larger storage cannot be written to safetensors.
        state |= {f"{attention}.{name}_proj.weight": x.clone() for name, x in (("q", q), ("k", k), ("v", v))}
        state |= {f"{mlp}.{name}_proj.weight": x.clone() for name, x in (("gate", gate), ("up", up))}
    return state
