"""A folder that `transformers` loads: `per_layer_config`, safetensors and a modelling file that needs no microglia."""

import copy
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.export.frozen import Written, probe, probe_logits
from microglia.export.unfused import unfused_config, unfused_weights
from microglia.models import load_model
from microglia.sites import find_sites

CAUSAL = "MicrogliaForCausalLM"
FILE = "modeling_microglia.py"
ROUNDING = 32  # units in the last place of the largest logit


@dataclass(frozen=True)
class Family:
    """The stock classes that the modelling file builds on, and which modelling file of this package that is."""

    causal: str
    decoder: str
    source: str = FILE


LLAMA = Family("LlamaForCausalLM", "LlamaModel")  # what the source says as it stands
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Family("MistralForCausalLM", "MistralModel"),
    "Qwen2ForCausalLM": Family("Qwen2ForCausalLM", "Qwen2Model"),
    "Qwen3ForCausalLM": Family("Qwen3ForCausalLM", "Qwen3Model"),
    "Gemma2ForCausalLM": Family("Gemma2ForCausalLM", "Gemma2Model"),
    "Gemma3ForCausalLM": Family("Gemma3ForCausalLM", "Gemma3TextModel"),
    "Phi3ForCausalLM": Family("MistralForCausalLM", "MistralModel"),
    "GPT2LMHeadModel": Family("GPT2LMHeadModel", "GPT2Model", "modeling_microglia_gpt2.py"),
}


def class_name(lm: Any) -> str:
    """The stock class of a model; that of its parent when it is itself an export.

    Raises UnsupportedModelError for any other class.
    """
    for kind in type(lm).__mro__:
        if kind.__name__ in FAMILIES:
            return kind.__name__
    raise UnsupportedModelError(
        f"{type(lm).__name__} cannot be exported; only {', '.join(FAMILIES)} can, so export the bare language model"
    )


def write_hf(lm: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, check: bool) -> Written:
    """Write the frozen model `lm`. Returns the largest difference of its logits to the reloaded ones (None unchecked).

    Raises MicrogliaError when what was written does not load as the same model.
    """
    family = FAMILIES[class_name(lm)]
    state, config = weights_and_config(lm)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / FILE).write_text(modelling_source(family), encoding="utf-8")
    if lm.generation_config is not None:
        lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _reloaded_difference(lm, folder) if check else None, []


def weights_and_config(lm: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the names of the written class, and the rows of config.json: dense counts, and every layer's own.

    Weights that are tied to others are left out.
    """
    sites = find_sites(lm)
    state = {name: x.detach() for name, x in lm.state_dict().items()}
    if lm.config.tie_word_embeddings:
        state = {name: x for name, x in state.items() if name not in (lm._tied_weights_keys or ())}
    if class_name(lm) == "Phi3ForCausalLM":
        state, config = unfused_weights(state, sites), unfused_config(lm.config)
    else:
        config = copy.deepcopy(lm.config)
    counts = {
        s.layer: {"num_attention_heads": s.geometry.heads, "num_key_value_heads": s.geometry.kv_heads} for s in sites
    }
    if class_name(lm) == "GPT2LMHeadModel":  # one count for q, k and v
        counts = {s.layer: {"num_attention_heads": s.geometry.heads} for s in sites}
    module = FILE.removesuffix(".py")
    row = config.to_dict() | {
        "architectures": [CAUSAL],
        "auto_map": {"AutoModel": f"{module}.MicrogliaModel", "AutoModelForCausalLM": f"{module}.{CAUSAL}"},
        "head_dim": sites[0].geometry.head_dim,  # from the width and the dense count it could not be told any more
        "dtype": str(lm.dtype).removeprefix("torch."),
        "per_layer_config": {str(layer): heads for layer, heads in counts.items()},
        # Validation reads the dense count, which stays in its old place.
        "allow_global_per_layer_attribute_access": True,
    }
    return state, {name: value for name, value in row.items() if name != "_name_or_path"}


def modelling_source(family: Family) -> str:
    """The modelling file, on this family's stock classes."""
    source = (resources.files("microglia.export") / family.source).read_text(encoding="utf-8")
    source = source.replace(f"import {LLAMA.causal} as", f"import {family.causal} as")
    return source.replace(f"import {LLAMA.decoder} as", f"import {family.decoder} as")


def _reloaded_difference(lm: Any, folder: Path) -> float:
    """0.0; for Phi-3, whose fused and unfused products round differently, what rounding explains."""
    again, _ = load_model(folder, dtype=lm.dtype, device=lm.device, trust_remote_code=True)
    again.set_attn_implementation(lm.config._attn_implementation)
    ours, theirs = probe_logits(lm).float(), probe_logits(again).float()
    difference = float((ours - theirs).abs().max())
    rounding = ROUNDING * torch.finfo(lm.dtype).eps * max(1.0, float(ours.abs().max()))
    if not difference <= (rounding if class_name(lm) == "Phi3ForCausalLM" else 0.0):
        raise MicrogliaError(
            f"the model read back from {folder} differs by {difference:.3g} in its logits over "
            f"{probe(lm).shape[1]} tokens; do not use it, and report this with the model's name"
        )
    return difference
