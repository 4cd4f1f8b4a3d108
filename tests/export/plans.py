"""A keep plan for any tiny model, and tokenizers of the kinds that llama.cpp knows."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from microglia.export import KeepPlan
from tests.tiny import geometries_of


def uneven_plan(model) -> KeepPlan:
    """Other heads and another number of them in each site; rectangular in groups of two."""
    grouped = geometries_of(model)[0].kv_heads == 4
    heads = ([2, 4, 7], [0, 1]) if grouped else ([0, 3, 4, 6, 7], [2])
    keep = tuple(torch.zeros(8).index_fill(0, torch.tensor(h), 1.0) for h in heads)
    return KeepPlan("mean", keep, prompts=5, threshold=0.0, adaptive_keep_ratio=0.4)


def _bpe(words, merges, **options) -> Tokenizer:
    return Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges, **options))


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like, as Llama 2's: a few merges, ASCII bytes for everything else."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128)), "▁", "a", "b", "▁a", "▁ab"]
    tokenizer = _bpe(words, [("▁", "a"), ("▁a", "b")], byte_fallback=True, unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like with Phi-3's special tokens, most of which swallow the white space behind them."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    stripped = {"</s>": True, "<|user|>": True, "<|end|>": True, "<|endoftext|>": False}
    tokenizer.add_tokens([AddedToken(x, rstrip=y, normalized=False, special=True) for x, y in stripped.items()])
    return tokenizer


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's, without most of its merges, of ASCII alone: half a character is an answer that nobody can show."""
    alphabet = [character for character in sorted(pre_tokenizers.ByteLevel.alphabet()) if character.isascii()]
    tokenizer = _bpe(["<eos>", *alphabet, "Ċ", "Ġ", "ab", "Ġa"], [("a", "b"), ("Ġ", "a")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
