"""One GGUF file for llama.cpp, of architecture `deci`: the one whose layers may differ in their head counts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from microglia.anatomy import FAMILIES, Anatomy, HeadGeometry, token_rows
from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.export.frozen import Written
from microglia.export.gguf_tokenizer import add_tokenizer
from microglia.export.to_hf import family_of, weights_and_config

NAME = "model.gguf"
ARCHITECTURE = "deci"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(lm: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, check: bool) -> Written:
    """Write the frozen model `lm` as model.gguf. Returns the largest difference of its tensors read back (None
    unchecked), and what llama.cpp cannot hold.

    Raises UnsupportedModelError for families and rotary embeddings that the architecture has not.
    """
    _check(lm)
    try:
        import gguf
    except ImportError as error:
        raise MicrogliaError("format gguf needs gguf; pip install 'microglia[export]'") from error
    state, config = weights_and_config(lm)
    tensors = dict(named_tensors(state, [layer.heads for layer in Anatomy(lm).layers]))
    if (factors := _rope_factors(lm)) is not None:
        tensors["rope_freqs.weight"] = factors
    writer = gguf.GGUFWriter(folder / NAME, ARCHITECTURE)
    lost = _describe(writer, lm, config)
    lost += add_tokenizer(writer, tokenizer, token_rows(lm))
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[_type(tensor)]
        writer.add_tensor(name, _stored(tensor), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _difference(gguf.GGUFReader(folder / NAME), tensors) if check else None, lost


def _check(lm: Any) -> None:
    if not family_of(lm).gguf:
        possible = [family.causal for family in FAMILIES.values() if family.gguf]
        raise UnsupportedModelError(
            f"{type(lm).__name__} cannot become GGUF: llama.cpp's architecture {ARCHITECTURE}, the only one with head "
            "counts per layer, has neither q/k-norms, soft caps, two kinds of rotary embedding nor learned positions; "
            f"export it with --format hf, or one of {', '.join(possible)}"
        )
    if lm.config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"the model's activation is {lm.config.hidden_act}, and architecture {ARCHITECTURE} has silu only; export "
            "it with --format hf"
        )


def named_tensors(state: dict[str, Tensor], geometries: list[HeadGeometry]) -> Iterator[tuple[str, Tensor]]:
    """Weights (out, in) and biases (out,) under llama.cpp's names, rows of q and k in its order."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(geometries))
    for name, tensor in state.items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UnsupportedModelError(
                f"the model has {name}, which architecture {ARCHITECTURE} does not; export it with --format hf"
            )
        if rotated := re.search(r"\.(\d+)\.self_attn\.[qk]_proj\.", name):
            tensor = in_pairs(tensor, geometries[int(rotated[1])].head_dim)
        yield new_name, tensor


def in_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (H·D, …), from transformers' order of a head (first halves, second halves of the rotated pairs)
    to llama.cpp's, in which the two of a pair are neighbours.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _describe(writer: Any, lm: Any, config: dict[str, Any]) -> list[str]:
    """Write sizes and rotary embedding; returns what of them is lost."""
    import gguf

    layers = [config["per_layer_config"][str(index)] for index in range(config["num_hidden_layers"])]
    context, lost = config["max_position_embeddings"], []
    window = config.get("sliding_window")
    if window is not None and window < context:
        context = window
        lost.append(f"the context ends at {window} tokens, where the sliding window began to forget")
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(TYPES[lm.dtype], f"MOSTLY_{TYPES[lm.dtype]}")])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([config["intermediate_size"]] * len(layers))
    writer.add_head_count([layer["num_attention_heads"] for layer in layers])
    writer.add_head_count_kv([layer["num_key_value_heads"] for layer in layers])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    return lost


def _rope_factors(lm: Any) -> Tensor | None:
    """What llama.cpp divides the plain rotary frequencies by, (D/2,); None when they are plain.

    Raises UnsupportedModelError for frequencies that change with the length or scale the attention.
    """
    rope = lm.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UnsupportedModelError(
            f"the rotary embedding is of type {kind}, which is not fixed; gguf is written for default, linear and "
            "llama3, export it with --format hf"
        )
    actual, _ = ROPE_INIT_FUNCTIONS[kind](lm.config)  # the model's own may have been rounded to its dtype
    plain = rope["rope_theta"] ** (-torch.arange(len(actual)).float() / len(actual))
    return plain / actual.cpu()


def _type(tensor: Tensor) -> str:
    """Matrices as they are; vectors (norms, biases), of which llama.cpp computes with no other, in float32."""
    return TYPES[tensor.dtype] if tensor.dim() > 1 else "F32"


def _stored(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor as the writer takes them; numpy has no bfloat16, which goes as pairs of bytes."""
    tensor = tensor.detach().cpu().contiguous()
    if _type(tensor) == "BF16":
        return tensor.view(torch.uint8).numpy()
    return (tensor if tensor.dim() > 1 else tensor.float()).numpy()


def read_tensor(entry: Any) -> Tensor:
    """A tensor of a GGUFReader, (out, in) or (out,)."""
    data = torch.from_numpy(np.array(entry.data))
    return data.view(torch.bfloat16) if entry.tensor_type.name == "BF16" else data


def _difference(reader: Any, tensors: dict[str, Tensor]) -> float:
    """0.0. Raises MicrogliaError, naming the tensor, when the file holds anything else than it should."""
    read = {entry.name: read_tensor(entry).float() for entry in reader.tensors}
    for name in sorted(read.keys() | tensors.keys()):
        if name not in read or name not in tensors or not torch.equal(read[name], tensors[name].cpu().float()):
            raise MicrogliaError(
                f"{name} reads back differently from the file, so it was not kept; write it again, on another disk"
            )
    return 0.0
