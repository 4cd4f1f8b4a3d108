"""How byte-level tokenizers split text before they merge: llama.cpp's names for it, and what they stand for."""

from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT2, SMOLLM = "gpt-2", "smollm"
_LIKE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expressions of tokenizer.json → llama.cpp's name.
SPLITS = {
    _LIKE_LLAMA3.replace("NUMBERS", r"\p{N}{1,3}"): "llama-bpe",
    _LIKE_LLAMA3.replace("NUMBERS", r"\p{N}"): "qwen2",
}


def pre_tokenizer(name: str) -> Any | None:
    """The pre-tokenizer that llama.cpp calls so; None for a name that is not known here."""
    if name in (GPT2, SMOLLM):
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return whole if name == GPT2 else pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole])
    for pattern, known in SPLITS.items():
        if known == name:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None
