"""The registry of tasks agrees with the folder; prompts and training targets are one text."""

import importlib
import pkgutil
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from microglia import tasks
from microglia.errors import ConfigError
from microglia.tasks import TASKS, Task, get_task
from microglia.tasks.prompts import generated_answer_prefix, render_prompt, uses_chat_template

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


@pytest.mark.parametrize("template", ["Answer:", "{question} {hint}", "{question} {}", "{question", "{{question}}"])
def test_a_template_that_cannot_hold_the_question_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"template .*\{question\}"):
        render_prompt(tokenizer(), "How many?", template)
