"""The demo in small: every part runs, the summary has its shape, and its figures are shown."""

import json
from dataclasses import replace
from functools import partial

import pytest

from microglia.benchmark import fixed_prompts, time_requests
from microglia.cli.demo import adds, comparison, picture, times, verdict
from microglia.experiments.demo import RECIPE, demo, shared_out
from microglia.experiments.side_by_side import PairRecipe
from microglia.results import from_json
from microglia.system import MicrogliaPruningSystem


def test_the_random_masks_share_all_problems_out():
    parts = shared_out(list(range(11)), 2)
    assert parts == [list(range(5)), list(range(5, 11))]
    assert shared_out([1], 2) == [[1], [1]]  # none is left without


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    small = {"max_steps": 3, "batch_size": 4, "limit": 32, "eval_limit": 4}
    recipe = PairRecipe(replace(RECIPE.first, **small), replace(RECIPE.second, **small))
    lines = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microglia.experiments.demo.HELD_OUT", 24)
        patch.setattr("microglia.experiments.demo.fixed_prompts", partial(fixed_prompts, count=2))
        patch.setattr("microglia.experiments.demo.time_requests", partial(time_requests, num_runs=1))
        how = {"problems": 12, "batch_size": 12, "max_new_tokens": 40, "tell": lines.append}
        summary = demo(folder, recipe=recipe, **how)
    return folder, summary, lines


@pytest.mark.slow
def test_the_summary_is_what_the_interface_promises(ran):
    folder, summary, _ = ran
    written = json.loads((folder / "summary.json").read_text())
    assert from_json(written) == summary
    assert list(summary.requests) == list(summary.steps) == ["dense", "pruned", "static_baseline"]
    assert {(one.prompts, one.n) for one in summary.requests.values()} == {(2, 1)}
    assert summary.requests["static_baseline"].charged == ("reading", "steps")
    named = {"dense", "pruned", "static_baseline", "random"}
    assert named | {"agent_parameters", "agent_share", "seconds"} <= set(written)
    figures = {"accuracy", "sparsity", "to_dense"}
    figures |= {"sparsity_by_difficulty", "accuracy_by_difficulty"}
    assert figures <= set(written["pruned"])
    pruned = summary.pruned
    assert summary.dense.sparsity == 0
    assert summary.agent_parameters == 6 * (6 * 16 * 16 + 16 + 16 * 8)  # 16 masks a site
    assert 0 < summary.agent_share < 0.01
    assert pruned.to_dense.diff == pytest.approx(pruned.accuracy - summary.dense.accuracy)


@pytest.mark.slow
def test_the_answers_are_paired_and_say_how_many_heads_each_kept(ran):
    answers = json.loads((ran[0] / "answers.json").read_text())
    ids = {name: [a["id"] for a in rows] for name, rows in answers.items()}
    assert ids["dense"] == ids["pruned"] == ids["static baseline"]
    assert {a["keep_ratio"] for a in answers["dense"]} == {1.0}
    assert len({a["difficulty"] for a in answers["dense"]}) == 8


@pytest.mark.slow
def test_the_checkpoint_it_leaves_can_be_used(ran):
    system = MicrogliaPruningSystem.from_pretrained(ran[0] / "checkpoint")
    assert isinstance(system.generate("What is 12 plus 30?", max_new_tokens=8), str)
    assert 0 <= system.get_sparsity() < 1


@pytest.mark.slow
def test_what_is_shown_are_the_figures_of_the_summary(ran):
    _, summary, lines = ran
    answered = [line.split(":")[0] for line in lines if "right at" in line]
    assert answered[:3] == ["dense", "pruned", "static baseline"]
    table = comparison(summary)
    assert list(table.columns[1].cells)[1] == f"{summary.pruned.accuracy:.1%}"
    timed = list(times(summary).columns[2].cells)
    assert [cell.split("×")[0] for cell in timed] == [f"{x.ratio_to_dense:.2f}" for x in summary.requests.values()]
    shown = picture(summary).plain
    assert len(shown.splitlines()) == 1 + len(summary.pruned.sparsity_by_difficulty)
    sentences = verdict(summary).plain
    for gain in (summary.adaptivity, summary.low_budget.adaptivity):
        sentence = adds(gain)
        assert sentence in sentences
        assert ("does not support" in sentence) == (gain.ci95[0] <= 0)
