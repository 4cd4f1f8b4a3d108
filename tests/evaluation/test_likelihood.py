"""Likelihood of texts after prompts: a batch says what one prompt, token by token, says; choices follow from it."""

import json
from pathlib import Path

import pytest
import torch

from microglia.attach import attached
from microglia.errors import ConfigError, DataError
from microglia.evaluation.choices import score_choices
from microglia.evaluation.likelihood import encode_pair, likelihoods
from microglia.evaluation.setup import Setup
from microglia.tasks import Choices, Example, get_task
from tests.tiny import step_logits, tiny_model, tiny_tokenizer, wild

PAIRS = [([5, 9, 40, 7, 3], [8, 12, 30]), ([6, 2], [50]), ([11, 12, 13, 14, 15, 16, 17, 18], [4, 4, 9, 61, 20])]


def slowly(model, pruner, prompt, text):
    """Sum of log-probabilities, greedy or not, and keep ratio: one row, one token a pass."""
    ids = torch.tensor([prompt])
    with attached(model, pruner) as trace:
        logits = step_logits(model, ids, torch.ones_like(ids), torch.tensor([text[:-1]]).long())[0]
    scores = logits.double().log_softmax(-1)
    total = sum(scores[place, token].item() for place, token in enumerate(text))
    return total, logits.argmax(-1).tolist() == text, trace.keep_ratio.item()


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_a_batch_says_what_each_prompt_says_alone(family, execution):
    model = tiny_model(family)
    pruner = wild(model)
    results = likelihoods(model, PAIRS, pruner, execution=execution)
    for (prompt, text), one in zip(PAIRS, results, strict=True):
        total, greedy, kept = slowly(model, pruner, prompt, text)
        assert one.log_probability == pytest.approx(total, abs=2e-3)
        assert (one.greedy, one.keep_ratio) == (greedy, pytest.approx(kept))


def test_what_greedy_decoding_says_is_greedy():
    model = tiny_model("llama")
    pruner, prompt = wild(model), torch.tensor([PAIRS[0][0]])
    with attached(model, pruner):
        said = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 5:].tolist()
    said_it, other = likelihoods(model, [(PAIRS[0][0], said), (PAIRS[0][0], [*said[:-1], 3])], pruner)
    assert said_it.greedy
    assert not other.greedy


def test_pruning_changes_a_text_but_not_its_first_token():
    model = tiny_model("llama")
    pruned, dense = likelihoods(model, PAIRS, wild(model)), likelihoods(model, PAIRS)
    assert pruned[1].log_probability == pytest.approx(dense[1].log_probability, abs=1e-4)  # one token
    assert abs(pruned[0].log_probability - dense[0].log_probability) > 0.01
    assert all(one.keep_ratio == 1 for one in dense)
    assert all(0 < one.keep_ratio < 1 for one in pruned)


def test_prompt_and_text_are_cut_where_the_prompt_ends():
    prompt, text = encode_pair(tiny_tokenizer(), "1+1=", "2!")
    assert (len(prompt), len(text)) == (4, 2)
    with pytest.raises(DataError, match=r"the text '' after a prompt of 4 tokens has no token to score"):
        encode_pair(tiny_tokenizer(), "1+1=", "")


def test_what_cannot_be_scored_is_refused():
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"have 300 tokens, but the model's context is 256"):
        likelihoods(model, [([5] * 200, [6] * 101)])
    with pytest.raises(
        ConfigError, match=r"execution='quick' is unknown; choose captured, compact, fast, dense or masked"
    ):
        likelihoods(model, PAIRS, execution="quick")
    with pytest.raises(ConfigError, match=r"execution='captured' scores no texts; choose compact, dense or masked"):
        likelihoods(model, PAIRS, execution="captured")


def example(number: int, texts: tuple[str, ...], gold: int, **more) -> Example:
    question = f"question{number}?"
    return Example(f"x/{number}", question, "?", "?", 0, choices=Choices(question, texts, gold), **more)


@pytest.mark.parametrize(("scoring", "divided"), [("likelihood", False), ("likelihood-per-character", True)])
def test_the_likeliest_choice_is_chosen(scoring, divided):
    model, tokenizer, task = tiny_model("llama"), tiny_tokenizer(), get_task("arc-easy")
    pruner = wild(model)
    shots = (example(9, ("no", "yes"), 1),)
    examples = [example(n, ("red", "a-long-green-one", "x9", "7"), n % 4, shots=shots) for n in range(6)]
    done = []
    setup = Setup(model, tokenizer, task, examples, batch_size=5)
    evaluation = score_choices(setup, pruner, scoring, progress=lambda *at: done.append(at))
    for e, answer in zip(examples, evaluation.answers, strict=True):
        prompt = f"Question: question9?\nAnswer: yes\n\nQuestion: {e.question}\nAnswer:"
        totals = [slowly(model, pruner, *encode_pair(tokenizer, prompt, f" {text}"))[0] for text in e.choices.texts]
        assert answer.choices == pytest.approx(totals, abs=5e-3)
        scores = [total / len(text) if divided else total for total, text in zip(totals, e.choices.texts, strict=True)]
        chosen = scores.index(max(scores))
        assert answer.text == e.choices.texts[chosen]
        assert answer.correct == (chosen == e.choices.gold)
        assert answer.new_tokens == len(answer.text) + 1
    assert done[-1] == (24, 24)
    assert evaluation.rows()[0]["choices"] == evaluation.answers[0].choices
    assert evaluation.summary().sparsity > 0


def test_an_example_without_choices_is_refused(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Why?", "answer": "7"}))
    task = get_task("jsonl")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    setup = Setup(model, tokenizer, task, task.load("test", data_dir=tmp_path / "x.jsonl"))
    with pytest.raises(ConfigError, match=r"example jsonl/x/0 has no choices to score; .*scoring='generation'"):
        score_choices(setup)
    with pytest.raises(ConfigError, match=r"scoring='guess' is unknown; choose generation, likelihood or"):
        score_choices(setup, scoring="guess")
    with pytest.raises(DataError, match="there is no example to evaluate"):
        score_choices(Setup(model, tokenizer, task, []))
