"""Two-layer models of every family, random weights, made in memory; one line a family."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 8, "attention_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt2": {"num_key_value_heads": None},
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of a family in evaluation mode. Weights are larger than at initialisation, so heads differ."""
    options = {**BASE, **FAMILIES[family], **changes}
    if family == "gpt2":
        for name in ("num_key_value_heads", "intermediate_size"):
            options.pop(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()
