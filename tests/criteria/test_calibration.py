"""What criteria share: passes as inference makes them, a model that stays as it was, and the interface."""

from pathlib import Path

import pytest
import torch

import microglia.criteria
from microglia.criteria import CRITERIA, Calibration, Criterion, get_criterion
from microglia.criteria.base import ranked
from microglia.criteria.random import Random
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.gate import Gate, keep_ratio
from microglia.pruner import Pruner
from microglia.tasks.base import Example
from tests.criteria.calibrated import EXAMPLES, LAYOUTS, Sums, calibration, one_pass_losses, raw_outputs
from tests.tiny_folder import character_tokenizer


@pytest.mark.parametrize("family", [*LAYOUTS, "mistral"])
def test_losses_are_those_of_one_pass_with_gates_on_the_answer(family):
    cal = calibration(family)
    torch.manual_seed(1)
    keep = [torch.rand(4, 8) for _ in cal.sites]
    with torch.no_grad():
        torch.testing.assert_close(cal.losses(cal.batches[0], keep), one_pass_losses(cal, keep), atol=1e-5, rtol=0)


def test_a_prompt_is_read_once_for_many_keeps():
    cal = calibration("mistral")
    prompt = cal.read(cal.batches[0])
    keep = cal.keeps(0.5)
    first = cal.losses(cal.batches[0], keep, prompt=prompt)
    cal.losses(cal.batches[0], prompt=prompt)
    assert cal.losses(cal.batches[0], keep, prompt=prompt).equal(first)
    assert not cal.losses(cal.batches[0], prompt=prompt).equal(first)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_outputs_are_those_of_the_answers_tokens(batch_size):
    cal = calibration("qwen2", batch_size=batch_size)
    seen = [[] for _ in cal.sites]
    cal.visit_outputs(lambda site, outputs: seen[site.index].append(outputs))
    for ours, truth in zip(seen, raw_outputs(cal), strict=True):
        torch.testing.assert_close(torch.cat(ours).double(), truth, atol=1e-5, rtol=0)


def test_ranks_keep_the_order_and_the_ties():
    first, second = ranked([torch.tensor([3e-9, 1e-9]), torch.tensor([5e8, 1e-9, -7.0])])
    assert first.tolist() == pytest.approx([1 / 4, -1 / 4])
    assert second.tolist() == pytest.approx([3 / 4, -1 / 4, -3 / 4])


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_known_by_its_file_and_says_whom_it_follows(name):
    criterion = CRITERIA[name]
    assert criterion.name == name
    assert criterion.__module__ == f"microglia.criteria.{name}"
    assert all(getattr(criterion, text) for text in ("score", "paper", "departs"))
    assert criterion.fill in ("zero", "mean")


def test_wrong_requests_get_a_sentence():
    with pytest.raises(
        ConfigError, match=r"criterion='magic' is unknown; choose activation_variance, agents, .* or weight"
    ):
        get_criterion("magic")
    with pytest.raises(ConfigError, match=r"criterion norm has no option 'size'; its options are projected"):
        get_criterion("norm", size=3)
    with pytest.raises(ConfigError, match=r"criterion random has no option 'size'; it has none"):
        get_criterion("random", size=3)
    with pytest.raises(ConfigError, match=r"random scores units the same for every prompt; leave per_input out"):
        Random().policy(calibration(), per_input=True)
    with pytest.raises(DataError, match="no example to calibrate on"):
        calibration(examples=[])
    with pytest.raises(ConfigError, match="batch_size=0 was given"):
        calibration(batch_size=0)


def test_scores_that_are_no_numbers_are_refused():
    class Broken(Random):
        def scores(self, calibration):
            return [x / 0 for x in super().scores(calibration)]

    with pytest.raises(MicrogliaError, match="random gave scores that are not finite"):
        Broken().policy(calibration())


def test_the_model_comes_back_as_it_was(snapshot):
    class Meddling(Random):
        def scores(self, calibration):
            calibration.model.lm_head.weight.requires_grad_(True)
            calibration.model.train()
            return super().scores(calibration)

    cal = calibration("qwen2")
    cal.model.model.layers[0].train()
    cal.model.model.norm.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    modes = [m.training for m in cal.model.modules()]
    before = snapshot(cal.model)
    Meddling().policy(cal)
    after = snapshot(cal.model)
    assert [m.training for m in cal.model.modules()] == modes
    assert before == after
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_policy_goes_through_the_budget_and_the_gate(family):
    cal = calibration(family)
    policy = get_criterion("weight").policy(cal)
    logits = cal.logits(policy)
    pruner = Pruner(policy, Gate(bucket=1)).with_budget(logits, cal.geometries).at(0.5)
    assert 0.5 <= keep_ratio(pruner.keep(logits, cal.geometries)).mean() < 0.8
    assert isinstance(get_criterion("weight"), Criterion)


def test_an_answer_without_words_is_named():
    bare = Example("bare-one", "1?", "", "0", 1)

    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # then not even a space stands before the answer
    cal = Calibration(calibration().model, tokenizer, Sums(), [*EXAMPLES, bare])
    with pytest.raises(DataError, match="example bare-one has no answer to calibrate on"):
        _ = cal.batches


def test_the_page_of_criteria_is_the_registry():
    page = (Path(__file__).resolve().parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for (name, criterion), row in zip(CRITERIA.items(), rows, strict=True):
        texts = (f"`{name}`{' ●' if criterion.per_input else ''}", criterion.score, criterion.paper, criterion.departs)
        assert row == "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def test_folder_and_registry_agree():
    folder = Path(microglia.criteria.__file__).parent
    shared = {"__init__", "base", "calibration", "descent", "moments", "order", "start", "trained", "weights"}
    assert {path.stem for path in folder.glob("*.py")} - shared == set(CRITERIA)
