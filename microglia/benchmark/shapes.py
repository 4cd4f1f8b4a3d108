"""Models to measure that need no download: the shapes of known models with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from microglia.errors import ConfigError
from microglia.models import REASONER, reasoner_path

# What decides bytes and operations, from the models' own config.json; everything else is the family's default.
SHAPES: dict[str, dict[str, Any]] = {
    "phi3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "vocab_size": 32064,
        # The 128k variant: full attention at every context. The original length, too: where a text crosses it, the
        # library reads it again from the start.
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 131072,
    },
    "qwen2.5-3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}

# Random values that every weight matrix repeats: drawing billions takes minutes. A prime, so that rows differ.
BLOCK = 999_983


def shape_config(shape: str, layers: int | None = None) -> Any:
    """The config of a built-in shape, of the reasoner or of a config folder; cut to its first `layers` layers."""
    if shape in SHAPES:
        config = AutoConfig.for_model(**SHAPES[shape])
    else:
        folder = reasoner_path() if shape == REASONER else Path(shape)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{shape!r} is no shape; give {', '.join(SHAPES)}, {REASONER} or a folder that holds a config.json"
            )
        config = AutoConfig.from_pretrained(folder)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ConfigError(f"layers={layers} was given; {shape} has {config.num_hidden_layers}, give 1 to that many")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def random_model(
    shape: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Any:
    """A model of a shape with random weights, in evaluation mode; built in `dtype` on `device`."""
    config = shape_config(shape, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    block = (torch.randn(BLOCK, generator=generator, device=device) * config.initializer_range).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            for part in parameter.view(-1).split(BLOCK):
                part.copy_(block[: len(part)])
            parameter._is_hf_initialized = True
    model.initialize_weights()  # norms, biases, and the buffers that the meta device left empty
    return model.eval()
