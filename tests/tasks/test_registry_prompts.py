"""The registry of tasks agrees with the folder; prompts and training targets are one text."""

import importlib
import pkgutil
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from microglia import tasks
from microglia.cli import options
from microglia.errors import ConfigError
from microglia.models import load_model
from microglia.tasks import TASKS, Example, Task, get_task
from microglia.tasks.prompts import (
    answer_end,
    continuation_ids,
    example_prompt,
    generated_answer_prefix,
    prompt_ids,
    render_prompt,
    uses_chat_template,
)

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **options)


def test_every_task_of_the_folder_is_registered_under_its_name() -> None:
    found = set()
    for module in pkgutil.iter_modules(tasks.__path__):
        members = vars(importlib.import_module(f"microglia.tasks.{module.name}")).values()
        found |= {m for m in members if isinstance(m, type) and issubclass(m, Task) and m is not Task}
    assert found == {*TASKS.values()}
    assert all(kind.name == name and get_task(name).name == name for name, kind in TASKS.items())


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no task 'gsm9k'; choose one of arithmetic, gsm8k"):
        get_task("gsm9k")


def test_the_help_names_every_task() -> None:
    words = get_args(get_type_hints(options.TaskOptions, include_extras=True)["dataset"])[1]
    words = words.replace(",", " ").replace(".", " ").split()
    assert sorted({*TASKS} - {*words}) == []


def test_a_task_is_handed_back_as_it_is() -> None:
    task = get_task("arithmetic", shots=2)
    assert get_task(task) is task
    with pytest.raises(ConfigError, match="shots is -1 but cannot be negative"):
        get_task("arithmetic", shots=-1)


def test_shots_are_the_first_of_train_and_are_not_trained_on() -> None:
    plain, shown = get_task("arithmetic"), get_task("arithmetic", shots=3)
    first = plain.load("train", limit=3)
    test = shown.load("test", limit=4)
    assert [e.question for e in test] == [e.question for e in plain.load("test", limit=4)]
    assert all([replace(shot, instruction=plain.instruction) for shot in e.shots] == first for e in test)
    assert [e.id for e in shown.load("train", limit=8)] == [e.id for e in plain.load("train", limit=8)[3:]]


def test_shots_stand_before_the_question_as_it_would_be_asked() -> None:
    example = get_task("arithmetic", shots=2).load("test", limit=1)[0]
    one, two = example.shots
    assert example_prompt(tokenizer(), example, Task.template) == (
        f"Question: {one.question}\nAnswer: {one.answer}\n\n"
        f"Question: {two.question}\nAnswer: {two.answer}\n\n"
        f"Question: {example.question}\nAnswer:"
    )
    turns = [f"<user>{shot.question}<end><assistant>{shot.answer}<end>" for shot in example.shots]
    chat = example_prompt(tokenizer(chat_template=CHAT), example, "ignored")
    assert chat == "".join([*turns, f"<user>{example.question}<end><assistant>"])


@pytest.mark.parametrize("name", TASKS)
def test_a_plain_tokenizer_fills_the_template_in(name: str) -> None:
    prompt = render_prompt(tokenizer(), "How many {of} 2%?", get_task(name).template)
    assert prompt == "Question: How many {of} 2%?\nAnswer:"
    assert generated_answer_prefix(tokenizer()) == " "
    assert not uses_chat_template(tokenizer())


def test_a_chat_tokenizer_speaks_its_own_template() -> None:
    chat = tokenizer(chat_template=CHAT)
    assert render_prompt(chat, "How many?", "ignored") == "<user>How many?<end><assistant>"
    assert generated_answer_prefix(chat) == ""
    assert uses_chat_template(chat)


@pytest.mark.parametrize(
    "template",
    [
        *("Answer:", "{question} {hint}", "{question} {}", "{question", "{{question}}"),
        *("{question:>2000000000}", "{question!r}", "{question.__class__}", "{question[0]}", "{question:{question}}"),
        "{question}" * 9,
    ],
)
def test_a_template_that_cannot_hold_the_question_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"template .*\{question\}"):
        render_prompt(tokenizer(), "How many?", template)


def special_tokenizer(template: str | None = None, *, end: bool = False) -> PreTrainedTokenizerFast:
    """Words and punctuation; it begins a text with <s> and, if `end`, ends it with </s>."""
    words = ["<unk>", "<s>", "</s>", "<turn>", "<end>", "hello", "Seven", ".", "user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if end else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<turn>", "<end>"], chat_template=template, **special
    )


TURNS = "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"


@pytest.mark.parametrize("template", [None, TURNS])
@pytest.mark.parametrize("end", [False, True])
def test_a_raw_prompt_begins_as_a_text_does_and_does_not_end(template, end) -> None:
    tokenizer = special_tokenizer(template, end=end)
    assert prompt_ids(tokenizer, ["hello", "<s>hello", "hello</s>"]) == [[1, 5], [1, 5], [1, 5, 2, 2][: 3 + end]]


def test_what_a_chat_template_wrote_gets_no_more_special_tokens() -> None:
    tokenizer = special_tokenizer(TURNS)
    prompt = render_prompt(tokenizer, "hello", "{question}")
    assert prompt == "<turn>hello<end><turn>"
    assert prompt_ids(tokenizer, [prompt]) == [[3, 5, 4, 3]]
    assert prompt_ids(tokenizer, [str(prompt) + ""]) == [[1, 3, 5, 4, 3]]  # a text of somebody else


def test_an_answer_ends_as_the_chat_template_ends_a_turn() -> None:
    assert answer_end(special_tokenizer()) == 2
    assert answer_end(special_tokenizer(TURNS)) == 4
    assert answer_end(special_tokenizer(TURNS.replace("<end>", " <end> </s>"))) == 4
    assert answer_end(special_tokenizer(TURNS.replace("<end>", ""))) == 2
    assert answer_end(special_tokenizer("{{ raise_exception('no') }}")) == 2
    assert answer_end(special_tokenizer(TURNS.replace("m.content", "m.content | upper"))) == 2
    phi = special_tokenizer(TURNS.replace("<end>", "<stop>"))
    phi.add_tokens([AddedToken("<stop>", special=True)])
    assert answer_end(phi) == phi.convert_tokens_to_ids("<stop>")
    without = special_tokenizer()
    without.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no end-of-text token"):
        answer_end(without)


def test_a_text_behind_another_begins_with_one_space() -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "▁7": 2, "▁a": 3, "7": 4, "a": 5}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # as Llama 2
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer(" 7", add_special_tokens=False)["input_ids"] == [1, 2]
    assert continuation_ids(tokenizer, " 7") == [2]
    assert continuation_ids(tokenizer, "7") == [2]
    _, reasoner = load_model("reasoner")
    for text in (" 3+4=7\n#### 7", "7", " First: 20/2=10"):
        assert continuation_ids(reasoner, text) == reasoner(text, add_special_tokens=False)["input_ids"]


def test_a_chat_model_is_told_to_box_its_answer_where_no_shot_shows_how() -> None:
    task = get_task("arithmetic")
    (example,) = task.load("test", limit=1)
    (shown,) = get_task("arithmetic", shots=1).load("test", limit=1)
    chat, base = tokenizer(), tokenizer()
    chat.chat_template = CHAT
    asked = f"{example.question}\n{task.instruction}"
    assert "step by step" in asked
    assert "\\boxed{}" in asked
    assert example_prompt(chat, example, Task.template) == f"<user>{asked}<end><assistant>"
    assert example_prompt(base, example, Task.template) == f"Question: {example.question}\nAnswer:"
    assert task.instruction not in example_prompt(chat, shown, Task.template)
    assert {name for name, kind in TASKS.items() if kind.instruction} == {"arithmetic", "gsm8k", "svamp"}


def test_a_whole_prompt_gets_nothing_around_it() -> None:
    chat = tokenizer()
    chat.chat_template = CHAT
    example = Example("x", "Once upon a time", " there was a fox.", "", 0, whole=True)
    prompt = example_prompt(chat, example, Task.template)
    assert prompt == "Once upon a time"
    assert type(prompt) is str
