"""Any prompt: pruned as if it were masked, or refused in one sentence; the next prompt never notices."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microglia.errors import DataError
from microglia.gate import Gate
from microglia.generation import generate
from tests.tiny import tiny_model, wild_policy
from tests.tiny_folder import LETTERS, SPECIAL, character_tokenizer

TEXTS = st.text(max_size=40) | st.text(st.characters(categories=["Cc", "Cf", "So", "Zs"]), max_size=20)
ONE = Gate(bucket=1)


@pytest.fixture(scope="module")
def subject():
    model = tiny_model("llama", vocab_size=len(SPECIAL) + len(LETTERS))
    return model, character_tokenizer(), wild_policy(model)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="\x00\x1b[2J\r\n\t")
@example(text="👩‍👩‍👧‍👦 مرحبا 🏳️‍🌈")
@example(text="half a pair \ud83d")
@example(text="<pad><eos><unk>")
@example(text="x" * 5000)
def test_any_prompt(subject, text):
    model, tokenizer, policy = subject
    found, sentences = [], []
    for path in ("masked", "compact"):
        try:
            output = generate(model, tokenizer, [text, "1 + 1"], policy, gate=ONE, path=path, max_new_tokens=3)
            found.append(output.tokens.tolist())
        except DataError as error:
            found.append("refused")
            sentences.append(str(error))
    assert found[0] == found[1]
    assert not any("\n" in sentence for sentence in sentences)
    assert (found[0] == "refused") == (not text.strip() or len(text) > 250 or "\ud83d" in text)
