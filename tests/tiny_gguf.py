"""Two-layer models as llama.cpp's files hold them: plain, quantised, with an output head beside the embeddings."""

from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from microglia.export.gguf_tokenizer import add_tokenizer
from microglia.export.to_gguf import in_pairs
from tests.tiny import tiny_model

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
SIZES = {
    "attention_bias": False,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
}
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, one for an empty line, three special ones; splits digits as SmolLM2's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *letters, "ĊĊ"]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [("Ċ", "Ċ")]))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    chosen = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[2], "unk_token": SPECIAL[0], "bos_token": SPECIAL[1]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **chosen)


def tiny_source(family: str, **changes):
    """The model before it is written, with a row of embeddings for each token."""
    return tiny_model(family, vocab_size=len(SPECIAL) + 257, **{**SIZES, **changes})


def write_tiny_gguf(path: Path, model, *, matrices: Kind = Kind.F32, head: Kind | None = None, **fields) -> dict:
    """Write `model`; returns what the file holds by transformers' names, in float32, rounded as it was.

    head: the type of an output head that is written although it is the embeddings; fields: by GGUF's names.
    """
    tokenizer, config = byte_tokenizer(), model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in fields.items():
        writer.add_string(name, value)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    held = {}
    state = model.state_dict()
    if head is None and config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in state.items():
        kind = (head if head is not None and name == "lm_head.weight" else matrices) if tensor.dim() > 1 else Kind.F32
        permuted = config.model_type == "llama" and any(part in name for part in ("q_proj", "k_proj"))
        rows = in_pairs(tensor, config.hidden_size // config.num_attention_heads) if permuted else tensor
        data = quantize(rows.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
        held[name] = torch.from_numpy(dequantize(quantize(tensor.float().numpy(), kind), kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
