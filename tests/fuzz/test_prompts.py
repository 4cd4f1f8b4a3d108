"""Any prompt: pruned as if it were masked, or refused in one sentence; the next prompt never notices."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microglia.errors import DataError
from microglia.generation import generate
from tests.tiny import tiny_model, wild
from tests.tiny_folder import LETTERS, SPECIAL, character_tokenizer

TEXTS = st.text(max_size=40) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "So", "Zs"]), max_size=20)


@pytest.fixture(scope="module")
def subject():
    model = tiny_model("llama", vocab_size=len(SPECIAL) + len(LETTERS))
    return model, character_tokenizer(), wild(model)


@settings(max_examples=25)
@given(text=TEXTS)
@example(text="")
@example(text="\x00\x1b[2J\r\n\t")
@example(text="👩‍👩‍👧‍👦 مرحبا 🏳️‍🌈")
@example(text="half a pair \ud83d")
@example(text="two halves \ud83d\ude00")
@example(text="<pad><eos><unk>")
@example(text="x" * 5000)
def test_any_prompt(subject, text):
    model, tokenizer, pruner = subject
    answers, sentences = [], []
    for execution in ("masked", "compact"):
        try:
            output = generate(model, tokenizer, [text, "1 + 1"], pruner, execution=execution, max_new_tokens=3)
            answers.append(output.tokens.tolist())
        except DataError as error:
            answers.append("refused")
            sentences.append(str(error))
    assert answers[0] == answers[1]
    assert not any("\n" in sentence for sentence in sentences)
    halves = any("\ud800" <= c <= "\udfff" for c in text)
    assert (answers[0] == "refused") == (not text.strip() or len(text) > 250 or halves)
