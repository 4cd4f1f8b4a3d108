"""One setup for all pruners: losses as by hand, and budgets of its own prompts."""

from dataclasses import replace

import pytest
import torch

from microglia.errors import ConfigError
from microglia.evaluation.run import Answer, Evaluation
from microglia.evaluation.setup import Setup
from microglia.execution import Decision, Masked
from microglia.tasks import get_task
from microglia.units import find_sites
from tests.tiny import geometries_of, tiny_model
from tests.tiny_folder import character_tokenizer, opinionated_pruner


@pytest.fixture(scope="module")
def setup() -> Setup:
    tokenizer, task = character_tokenizer(), get_task("arithmetic")
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    return Setup(model, tokenizer, task, task.load("test", limit=5))


@pytest.fixture(scope="module")
def pruner(setup):
    return opinionated_pruner(setup.model)


@torch.no_grad()
def test_losses_are_those_of_the_answers_under_hard_gates(setup, pruner) -> None:
    two, five = (replace(setup, batch_size=size).losses(pruner) for size in (2, 5))
    assert two == pytest.approx(five, abs=1e-4)
    dense = setup.losses(None)
    assert max(abs(a - b) for a, b in zip(five, dense, strict=True)) > 1e-3
    example = setup.examples[0]  # the same by hand: one pass, no padding, no cache
    prompt = setup.tokenizer(setup.task.template.format(question=example.question))["input_ids"]
    answer = [*setup.tokenizer(" " + example.answer)["input_ids"], setup.tokenizer.eos_token_id]
    keep = pruner.keep([x[:1] for x in setup.logits(pruner)], geometries_of(setup.model))
    assert 0 < sum(float(k.mean()) for k in keep) < len(keep)

    def by_hand() -> float:
        logits = setup.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))

    assert dense[0] == pytest.approx(by_hand(), abs=1e-4)
    where = torch.tensor([[False] * len(prompt) + [True] * len(answer)])
    with Masked(where).apply(find_sites(setup.model), Decision(keep)):
        assert five[0] == pytest.approx(by_hand(), abs=1e-4)


def test_a_budget_of_the_setups_prompts_holds_on_them(setup, pruner) -> None:
    with pytest.raises(ConfigError, match="there are no prompts to calibrate it on"):
        pruner.at(0.7)
    calibrated = setup.calibrated(pruner)
    assert calibrated.budget.prompts == 5
    assert all(a.equal(b) for a, b in zip(calibrated.budget.logits, setup.logits(pruner), strict=True))
    for target in (0.5, 0.8):
        answers = replace(setup, max_new_tokens=1).answers(calibrated.at(target)).answers
        kept = sum(answer.keep_ratio for answer in answers) / 5
        assert target <= kept + 1e-6 < target + 0.15


def test_sparsity_per_token_weighs_each_answer_by_its_length() -> None:
    answers = [Answer(str(i), "", True, keep, tokens, 1, "") for i, (keep, tokens) in enumerate([(1.0, 30), (0.5, 10)])]
    summary = Evaluation(tuple(answers), 0.0, {}).summary()
    assert summary.sparsity == 0.25
    assert summary.sparsity_per_token == 1 - (30 + 5) / 40
    silent = [replace(answer, new_tokens=0) for answer in answers]
    assert Evaluation(tuple(silent), 0.0, {}).summary().sparsity_per_token == 0.25
