"""What the dense model writes: the tokens of its own generate, as ids, whatever the batch, never made twice."""

import json

import pytest
import torch

from microglia.errors import ConfigError
from microglia.generation import generate
from microglia.tasks.prompts import prompt_ids, render_prompt
from microglia.training import continuations as module
from microglia.training.asking import ask_itself
from microglia.training.continuations import Drawn, continuations, weights_checksum
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_folder import character_tokenizer

PROMPTS = ["abc", "a", "hello!", "xy", "what?is?this?"]


def written(model, folder, prompts=PROMPTS, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROGLIA_CACHE", str(folder))
        return continuations(model, tiny_tokenizer(), prompts, **{"max_new_tokens": 12, **options})


def test_greedy_ones_are_those_of_generate(family, tmp_path):
    model = tiny_model(family)
    for batch_size in (1, 2):
        found = written(model, tmp_path / str(batch_size), batch_size=batch_size)
        for prompt, one in zip(PROMPTS, found, strict=True):
            ids = torch.tensor(prompt_ids(tiny_tokenizer(), [prompt]))
            truth = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
            assert (one.prompt_ids, one.answer_ids) == (ids[0].tolist(), truth)
            assert one.finished == (truth[-1] == 1)


def test_what_is_kept_is_not_written_again(tmp_path, monkeypatch):
    model = tiny_model("llama")
    first = written(model, tmp_path)
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("written again"))
    assert written(model, tmp_path) == first
    assert written(model, tmp_path, PROMPTS[::-1], batch_size=1) == first[::-1]
    assert written(model, tmp_path, ["a", "a"]) == [first[1]] * 2


@pytest.mark.parametrize("change", ["weights", "length", "temperature"])
def test_nothing_is_taken_from_other_circumstances(tmp_path, change):
    model, options = tiny_model("llama"), {}
    first = written(model, tmp_path)
    if change == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    else:
        options = {"max_new_tokens": 9} if change == "length" else {"temperature": 3.0}
    again = written(model, tmp_path, **options)
    assert len([*tmp_path.rglob("*.jsonl")]) == 2
    assert (change == "weights") or again != first


def test_an_interrupted_one_goes_on(tmp_path, monkeypatch):
    model, made = tiny_model("llama"), []

    def interrupted(*args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args[2])
        return generate(*args, **options)

    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(model, tmp_path, batch_size=2)
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"prompt": "cut sho')
    made.clear()
    done = []
    found = written(model, tmp_path, batch_size=2, progress=lambda *how: done.append(how))
    assert made == [["what?is?this?"]]  # batches go by length
    assert done == [(5, 5)]
    monkeypatch.setattr(module, "generate", generate)
    assert found == written(model, tmp_path / "whole", batch_size=2)


def test_a_sampled_one_depends_on_its_prompt_and_seed_and_on_no_batch(tmp_path):
    model = tiny_model("qwen2")
    one, three = (written(model, tmp_path / str(n), batch_size=n, temperature=1.5, seed=4) for n in (1, 3))
    assert one == three
    assert one != written(model, tmp_path / "seed", temperature=1.5, seed=5)


def test_tokens_are_drawn_with_the_models_probabilities():
    scores = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).repeat(1, 1)
    counts = torch.zeros(4)
    for row in range(40):
        drawn = Drawn(2.0, [f"row {row}"], 50)
        for _ in range(50):
            counts += drawn(torch.zeros(1, 1), scores)[0].isfinite()
    expected = (scores[0] / 2).softmax(-1)
    assert (counts / 2000 - expected).abs().max() < 0.03
    assert counts[3] == 0


def test_an_end_is_what_the_model_wrote_and_never_added(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[1] = 50 * model.lm_head.weight[1]  # an end that is often likely, and often not
    found = written(model, tmp_path, [chr(letter) for letter in range(ord("a"), ord("z"))], max_new_tokens=4)
    assert {one.finished for one in found} == {True, False}
    for one in found:
        assert one.answer_ids.count(1) == int(one.finished)
        assert len(one.answer_ids) == 4 or one.finished


def test_settings_that_cannot_be_are_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"temperature=-1 was given; it must be at least 0"):
        written(model, tmp_path, temperature=-1)
    with pytest.raises(ConfigError, match="max_new_tokens=0 was given; it must be at least 1"):
        written(model, tmp_path, max_new_tokens=0)


def test_the_checksum_is_of_the_weights_and_their_precision():
    model = tiny_model("llama")
    assert weights_checksum(model) == weights_checksum(tiny_model("llama"))
    assert weights_checksum(model) != weights_checksum(tiny_model("llama", dtype=torch.bfloat16))
    assert weights_checksum(model) != weights_checksum(tiny_model("llama", seed=1))


# --- prompts that the model asks itself -------------------------------------------------------------------------------


def chat():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{'@' if m.role == 'user' else '#'}}{{m.content}}<eos>{% endfor %}"
        "{% if add_generation_prompt %}#{% endif %}"
    )
    return tokenizer


def asked(model, count, folder):
    lines = ask_itself(model, chat(), count, cache_dir=folder).read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_a_model_asks_itself_and_goes_on(tmp_path, monkeypatch):
    model = tiny_model("llama", vocab_size=len(character_tokenizer()))
    opened = []

    def watched(lm, tokenizer, prompts, **options):
        opened.extend(prompts)
        return generate(lm, tokenizer, prompts, **{**options, "max_new_tokens": 24})

    monkeypatch.setattr("microglia.training.asking.generate", watched)
    few = asked(model, 5, tmp_path)
    assert len(set(few)) == 5
    assert set(opened) == {"@"}
    assert render_prompt(chat(), "x", "").startswith("@x")
    before = len(opened)
    more = asked(model, 6, tmp_path)
    assert more[:5] == few
    assert len(opened) - before <= 64  # what was kept is not asked again


def test_a_model_without_turns_cannot_ask_itself(tmp_path):
    model = tiny_model("llama", vocab_size=len(character_tokenizer()))
    with pytest.raises(
        ConfigError, match="self_prompts was given, but the tokenizer has no chat template; give prompts"
    ):
        ask_itself(model, character_tokenizer(), 5, cache_dir=tmp_path)
