"""Answers that are cut by their worked answer: every row at its own length, whatever else is in its batch."""

from dataclasses import replace

import pytest

from microglia.errors import ConfigError
from microglia.evaluation.answer_limit import limits
from microglia.evaluation.setup import Setup
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from tests.tiny_folder import character_tokenizer, opinionated_pruner, save_tiny_model

TASK = get_task("arithmetic")


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> MicrogliaPruningSystem:
    """A model that never stops on its own."""
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path_factory.mktemp("answer-limit") / "model"))
    system.pruner = opinionated_pruner(system.model)
    return system


def test_the_limit_is_a_multiple_of_the_worked_answer() -> None:
    examples = TASK.load("test", limit=8)
    written = [len(" " + e.answer) + 1 for e in examples]  # characters, and the end of text
    tokenizer = character_tokenizer()
    assert limits(tokenizer, examples, 1.5, 1000) == [-(-3 * n // 2) + 8 for n in written]
    assert limits(tokenizer, examples, 1.5, 30) == [30] * 8
    assert limits(tokenizer, examples, None, 77) == [77] * 8
    with pytest.raises(ConfigError, match=r"answer_limit=0.5 was given; it must be 1 or more"):
        limits(tokenizer, examples, 0.5, 30)


@pytest.mark.parametrize("execution", ["compact", "masked", "captured"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_row_ends_at_its_own_limit(system, execution: str, batch_size: int) -> None:
    examples = TASK.load("test", limit=5)
    setup = Setup(system.model, system.tokenizer, TASK, examples, execution, batch_size, max_new_tokens=90)
    most = limits(system.tokenizer, examples, 1.0, 90)
    assert len(set(most)) > 2
    for pruner in (None, system.pruner):
        whole = setup.answers(pruner)
        assert {answer.new_tokens for answer in whole.answers} == {90}  # it does not stop on its own
        cut = replace(setup, answer_limit=1.0).answers(pruner)
        assert [answer.new_tokens for answer in cut.answers] == most
        assert all(a.text.startswith(b.text) for a, b in zip(whole.answers, cut.answers, strict=True))
        assert all(len(b.text) <= n for b, n in zip(cut.answers, most, strict=True))
