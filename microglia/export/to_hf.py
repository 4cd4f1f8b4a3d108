"""A folder that `transformers` loads: `per_layer_config`, safetensors and a modelling file that needs no microglia."""

import copy
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from microglia.anatomy import FAMILIES, Anatomy, Family, FusedEqual
from microglia.errors import MicrogliaError, UnsupportedModelError, first_line
from microglia.export.frozen import Written, probe, probe_logits
from microglia.export.unfused import unfused_config, unfused_weights
from microglia.models import load_model

CAUSAL = "MicrogliaForCausalLM"
FILE = "modeling_microglia.py"
ROUNDING = 32  # units in the last place of the largest logit


def family_of(lm: Any) -> Family:
    """The family of a bare language model; that of its parent class when it is itself an export.

    Raises UnsupportedModelError for any other class.
    """
    by_class = {family.causal: family for family in FAMILIES.values()}
    for kind in type(lm).__mro__:
        if kind.__name__ in by_class:
            return by_class[kind.__name__]
    raise UnsupportedModelError(
        f"{type(lm).__name__} cannot be exported; only {', '.join(by_class)} can, so export the bare language model"
    )


def write_hf(lm: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, check: bool) -> Written:
    """Write the frozen model `lm`. Returns the largest difference of its logits to the reloaded ones (None unchecked).

    Raises MicrogliaError when what was written does not load as the same model.
    """
    family = family_of(lm)
    state, config = weights_and_config(lm)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / FILE).write_text(modelling_source(family), encoding="utf-8")
    if lm.generation_config is not None:
        valid(lm.generation_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _reloaded_difference(lm, folder) if check else None, []


def weights_and_config(lm: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the names of the written class, and the rows of config.json: dense counts, and every layer's own.

    Weights that are tied to others are left out.
    """
    family, layers = family_of(lm), Anatomy(lm).layers
    state = {name: x.detach() for name, x in lm.state_dict().items()}
    if lm.config.tie_word_embeddings:
        state = {name: x for name, x in state.items() if name not in (lm._tied_weights_keys or ())}
    if family.export_as is not None:
        state, config = unfused_weights(state, layers), unfused_config(lm.config, layers[0].heads.head_dim)
    else:
        config = copy.deepcopy(lm.config)
    counts = {x.index: {"num_attention_heads": x.heads.heads} for x in layers}
    if not isinstance(family.attention, FusedEqual):  # which has one count for q, k and v
        counts = {x.index: {**counts[x.index], "num_key_value_heads": x.heads.kv_heads} for x in layers}
    module = FILE.removesuffix(".py")
    row = config.to_dict() | {
        "architectures": [CAUSAL],
        "auto_map": {"AutoModel": f"{module}.MicrogliaModel", "AutoModelForCausalLM": f"{module}.{CAUSAL}"},
        "head_dim": layers[0].heads.head_dim,  # from the width and the dense count it could not be told any more
        "dtype": str(lm.dtype).removeprefix("torch."),
        "per_layer_config": {str(layer): heads for layer, heads in counts.items()},
        # Validation reads the dense count, which stays in its old place.
        "allow_global_per_layer_attribute_access": True,
    }
    return state, {name: value for name, value in row.items() if name != "_name_or_path"}


def valid(settings: GenerationConfig) -> GenerationConfig:
    """A copy of generation settings that transformers agrees to write: what they set without effect is unset.

    Such is a temperature without sampling. Raises UnsupportedModelError for settings that no model can generate with.
    """
    settings = copy.deepcopy(settings)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE):
            setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the model's generation_config cannot be written ({first_line(error)}); mend it before the export"
        ) from error
    return settings


def modelling_source(family: Family) -> str:
    """The modelling file, on this family's stock classes."""
    source = (resources.files("microglia.export") / family.modelling).read_text(encoding="utf-8")
    written = family if family.export_as is None else FAMILIES[family.export_as]
    source = source.replace("import LlamaForCausalLM as", f"import {written.causal} as")
    return source.replace("import LlamaModel as", f"import {written.decoder} as")


def _reloaded_difference(lm: Any, folder: Path) -> float:
    """0.0; for Phi-3, whose fused and unfused products round differently, what rounding explains."""
    again, _ = load_model(folder, dtype=lm.dtype, device=lm.device, trust_remote_code=True)
    again.set_attn_implementation(Anatomy(lm).attention_backend)
    ours, theirs = probe_logits(lm).float(), probe_logits(again).float()
    difference = float((ours - theirs).abs().max())
    rounding = ROUNDING * torch.finfo(lm.dtype).eps * max(1.0, float(ours.abs().max()))
    if not difference <= (rounding if family_of(lm).export_as is not None else 0.0):
        raise MicrogliaError(
            f"the model that was written reads back with logits that differ by {difference:.3g} over "
            f"{probe(lm).shape[1]} tokens, so it was not kept; report this with the model's name"
        )
    return difference
