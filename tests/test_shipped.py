"""Agents that come with the package: `generate` without a checkpoint uses those of the model."""

import json

import pytest

from microglia.checkpoint import Checkpoint
from microglia.checkpoint.shipped import PLACE, shipped, shipped_names
from microglia.errors import ConfigError
from tests.cli.test_cli import run


def test_every_model_with_agents_is_one_that_has_a_name():
    assert "reasoner" in shipped_names()
    for name in shipped_names():
        assert Checkpoint.from_pretrained(shipped(name)).config.base_model == name


def test_together_they_are_small():
    assert sum(file.stat().st_size for file in PLACE.rglob("*") if file.is_file()) < 8 * 2**20


def test_a_model_without_agents_gets_a_sentence_that_names_those_with_some():
    with pytest.raises(ConfigError, match=r"model='gpt2'; say --model-path FOLDER.* or choose .*reasoner"):
        shipped("gpt2")


def test_a_question_alone_is_answered_pruned():
    done = run("generate", "What is 3 + 4?", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert "7" in result["answers"][0]["text"]
    assert result["sparsity"] > 0.1
