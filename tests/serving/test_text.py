"""Growing text: all pieces together are the text up to the first stop, and no piece has to be taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from microglia.serving.text import HALF, GrowingText


def byte_tokenizer():
    """One token a byte, so that most characters beyond ASCII come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


BYTES = byte_tokenizer()


def grown(text, stop=()):
    growing, pieces = GrowingText(BYTES, stop), []
    for token in BYTES(text)["input_ids"]:
        pieces.append(growing.add(token))
        if growing.stopped:
            break
    return [*pieces, growing.rest()], growing.stopped


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=HALF), max_size=30))
def test_pieces_are_the_text_and_whole_characters(text):
    pieces, stopped = grown(text)
    assert "".join(pieces) == text
    assert not stopped
    assert not any(HALF in piece for piece in pieces)


@settings(max_examples=100)
@given(st.text("abé", max_size=25), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_stop_ends_the_text_and_is_not_in_it(text, stops):
    # Truth: the prefixes of the text, shortest first; the first that holds a stop is where reading ends.
    ended = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    wanted = text if ended is None else ended[: min(ended.find(stop) for stop in stops if stop in ended)]
    pieces, stopped = grown(text, stops)
    assert "".join(pieces) == wanted
    assert stopped == (ended is not None)


@pytest.mark.parametrize(
    ("text", "pieces"), [("a##b###", ["a", "", "", "##b", "", "", "", ""]), ("a##", ["a", "", "", "##"])]
)
def test_what_may_become_a_stop_is_held_back(text, pieces):
    assert grown(text, ["###"])[0] == pieces


def word_tokenizer():
    """As SentencePiece has it: a space is part of the word behind it, and is not shown in front of the first."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁The": 3, "▁answer": 4, "▁is": 5, "▁7": 6, "7": 7, ",": 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("before", "text"), [((), "7, answer"), ((5,), " 7, answer"), ((1, 3, 4, 5), " 7, answer"), ((1,), "7, answer")]
)
def test_a_completion_keeps_the_space_behind_its_prompt(before, text):
    growing = GrowingText(word_tokenizer(), (), before)
    pieces = [growing.add(token) for token in (6, 8, 4)]
    assert "".join([*pieces, growing.rest()]) == text
