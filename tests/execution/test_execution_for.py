"""Executions by their names, and what each of them does with a decision."""

import pytest

from microglia.errors import ConfigError
from microglia.execution import EXECUTIONS, Captured, Compact, Dense, Fast, Masked, execution_for
from microglia.generation import generate
from tests.tiny import tiny_model, tiny_tokenizer, uneven, wild

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
PLAIN = {"max_new_tokens": 10, "eos_token_id": None}
KINDS = {"dense": Dense, "masked": Masked, "compact": Compact, "captured": Captured, "fast": Fast}


def test_every_execution_has_its_name():
    assert EXECUTIONS == KINDS
    assert {name: kind.name for name, kind in EXECUTIONS.items()} == {name: name for name in KINDS}
    assert [name for name, kind in EXECUTIONS.items() if not kind.prunes] == ["dense"]


@pytest.mark.parametrize("name", list(KINDS))
def test_an_execution_is_made_for_a_model_by_its_name(name):
    model = tiny_model("llama")
    made = execution_for(name, model)
    assert type(made) is KINDS[name]
    assert execution_for(made, model) is made
    if name == "captured":
        assert made.model.lm is model


def test_an_unknown_execution_is_refused():
    with pytest.raises(ConfigError) as caught:
        execution_for("graph", tiny_model("llama"))
    assert str(caught.value) == "execution='graph' is unknown; choose captured, compact, fast, dense or masked"


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "rows"])
def test_executions_that_prune_write_the_same_and_dense_writes_what_no_pruner_writes(family, make):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    pruner = make(model)
    results = {name: generate(model, tokenizer, PROMPTS, pruner, execution=name, **PLAIN) for name in KINDS}
    untouched = generate(model, tokenizer, PROMPTS, **PLAIN)
    assert results["compact"].tokens.equal(results["masked"].tokens)
    assert results["captured"].tokens.equal(results["masked"].tokens)
    assert results["fast"].tokens.equal(results["masked"].tokens)
    assert results["dense"].tokens.equal(untouched.tokens)
    assert not results["masked"].tokens.equal(untouched.tokens)
    assert results["dense"].keep == untouched.keep == []
    for name in ("compact", "captured", "fast"):
        assert all(a.equal(b) for a, b in zip(results[name].keep, results["masked"].keep, strict=True))
