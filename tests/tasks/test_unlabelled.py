"""Prompts without answers: every source, their splits, and what is refused."""

import json

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import get_task
from microglia.tasks.prompts import example_prompt
from microglia.tasks.shipped import shipped_prompts
from tests.tiny_folder import character_tokenizer

TASK = get_task("prompts")


def questions(split, data_dir):
    return [example.question for example in TASK.load(split, data_dir=data_dir)]


@pytest.fixture
def txt(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"prompt {i} " for i in range(40)) + "\n\n")
    return path


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a prompt\nof lines {i}", "kind": "x"}) + "\n" for i in range(20)))
    return path


def test_a_file_is_divided_into_train_and_validation(txt):
    train, validation = questions("train", txt), questions("validation", txt)
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(f"prompt {i}" for i in range(40)) == sorted(questions("test", txt))


def test_a_folder_holds_a_file_for_each_split(tmp_path, txt, jsonl):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text(txt.read_text())
    (folder / "test.jsonl").write_text(jsonl.read_text())
    assert len(questions("train", folder)) == 36
    assert len(questions("validation", folder)) == 4
    assert questions("test", folder) == [f"a prompt\nof lines {i}" for i in range(20)]
    (folder / "validation.txt").write_text("held out")
    assert len(questions("train", folder)) == 40
    assert questions("validation", folder) == ["held out"]


def test_sources_are_joined_and_nothing_is_asked_twice(txt, jsonl):
    shipped = [row.prompt for row in shipped_prompts("train")]
    assert questions("train", None) == shipped
    again = txt.with_name("again.txt")
    again.write_text(txt.read_text())
    assert questions("train", f"{txt},shipped, {jsonl},{again}") == (
        questions("train", txt) + shipped + questions("train", jsonl)
    )


def test_a_tasks_prompts_are_asked_as_the_task_asks_them_and_carry_no_answers():
    arithmetic = get_task("arithmetic").load("validation")
    examples = TASK.load("validation", data_dir="arithmetic")
    assert [e.question for e in examples] == [e.question for e in arithmetic]
    assert {e.answer for e in examples} == {""}
    chat = character_tokenizer()
    chat.chat_template = "{% for m in messages %}<{{m.content}}>{% endfor %}"
    template = get_task("arithmetic").template
    assert example_prompt(chat, examples[0], TASK.template) == example_prompt(chat, arithmetic[0], template)


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'nowhere.txt' is no file, folder or task .*; give FILE, shipped, TASK or"):
        questions("train", "nowhere.txt")
    with pytest.raises(ConfigError, match="task bbh has no split 'train'"):
        questions("train", "bbh=somewhere")
    (tmp_path / "bad.jsonl").write_text('{"question": "no prompt"}\n')
    with pytest.raises(DataError, match="line 1 has no field 'prompt'"):
        questions("train", tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"a folder of prompts must hold train\.jsonl or train\.txt"):
        questions("train", tmp_path)
    (tmp_path / "one.txt").write_text("\n")
    with pytest.raises(DataError, match="leaves no prompt for train"):
        questions("train", tmp_path / "one.txt")
