"""A tokenizer in GGUF's words: byte-level BPE and SentencePiece-like BPE, as llama.cpp tells them apart."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from microglia.catalogue.splits import GPT2, SMOLLM, SPLITS
from microglia.errors import UnsupportedModelError

NORMAL, CONTROL, USER, UNUSED, BYTE = 1, 3, 4, 5, 6  # llama.cpp's token types
# llama.cpp has rules for tokenizers by the name of the model, so a file gets a neutral one, but for the rule it needs.
NEUTRAL, STRIPPING = "microglia", "phi-3"
NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}  # by that rule; behind all other special tokens white space is dropped
SPACES = "llama.cpp reads other white space beside special tokens than the original tokenizer; give it token ids there"
LEFT_OUT = "the tokenizer is of a kind that the file cannot hold; tokenise with the original one"


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Write the vocabulary, padded to `size`. Returns what is lost: nothing, or the whole tokenizer.

    Raises UnsupportedModelError for a tokenizer with more tokens than `size`, the rows of the embedding.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rows: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": None}}
    model = rows["model"]
    kind = _kind(rows)
    if model["type"] != "BPE" or kind is None:
        writer.add_name(NEUTRAL)
        writer.add_tokenizer_model("none")
        return [LEFT_OUT]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    added = {entry["content"]: CONTROL if entry["special"] else USER for entry in rows["added_tokens"]}
    vocabulary = {**model["vocab"], **{entry["content"]: entry["id"] for entry in rows["added_tokens"]}}
    names = {index: token for token, index in vocabulary.items()}
    if (last := max(names)) >= size:
        raise UnsupportedModelError(
            f"the tokenizer has the token {names[last]!r} of id {last}, but the embedding has {size} rows, and "
            f"llama.cpp wants one for each; add them with model.resize_token_embeddings({last + 1}), or give the "
            "model's own tokenizer"
        )
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    writer.add_token_list(tokens)
    writer.add_token_types([_type_of(token, index in names, added, kind) for index, token in enumerate(tokens)])
    if kind == "llama":
        writer.add_tokenizer_model("llama")
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])  # merged in the order of their scores
        writer.add_add_space_prefix(_space_in_front(rows) != "never")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    name, exact = _name(rows["added_tokens"])
    writer.add_name(name)
    # With a space in front of a text, llama.cpp puts one behind every special token too.
    return [] if exact and _space_in_front(rows) != "first" else [SPACES]


def _kind(rows: dict[str, Any]) -> str | None:
    """`llama` for SentencePiece-like BPE, else llama.cpp's name of the pre-tokenizer, None when it has none."""
    if rows["model"].get("byte_fallback"):
        return "llama"
    pre = rows.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if rows.get("normalizer") not in (None, {"type": "NFC"}) or last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        return SMOLLM
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        return SPLITS.get(steps[0]["pattern"].get("Regex"))
    return None


def _name(added: list[dict[str, Any]]) -> tuple[str, bool]:
    """The model's name, by which llama.cpp strips behind special tokens or not, and whether the tokenizer does so."""
    names = {entry["content"] for entry in added}
    behind = {entry["content"] for entry in added if entry["rstrip"]}
    before = {entry["content"] for entry in added if entry["lstrip"]}
    if behind == names - NOT_STRIPPED and names >= {"</s>", *NOT_STRIPPED} and not before:
        return STRIPPING, True
    return NEUTRAL, not behind | before


def _type_of(token: str, known: bool, added: dict[str, int], kind: str) -> int:
    if not known:
        return UNUSED
    if kind == "llama" and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return BYTE
    return added.get(token, NORMAL)


def _space_in_front(rows: dict[str, Any]) -> str:
    """Where text gets a space in front before it is tokenised: `never`, `first` in the whole text, or `always`."""
    normalizer = rows.get("normalizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), rows.get("pre_tokenizer") or {}]
    if any(step.get("type") == "Prepend" for step in steps):
        return "always"
    return next((step["prepend_scheme"] for step in steps if "prepend_scheme" in step), "never")
