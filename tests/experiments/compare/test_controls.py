"""Controls: the agents without the prompt, and the static baseline given the agents' time."""

import json
from dataclasses import replace

import pytest
import torch

from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.experiments.compare.controls import Shuffled, frozen, shuffled
from microglia.gate import keep_ratio
from microglia.reading import read_prompts
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from tests.experiments.compare.test_compare import FEW, folder, made, run  # noqa: F401  # fixtures
from tests.tiny_folder import opinionated_pruner, save_tiny_model


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path_factory.mktemp("controls")))
    task = get_task("arithmetic")
    return Setup(system.model, system.tokenizer, task, task.load("validation", limit=12), batch_size=5)


def agents_of(setup):
    return setup.calibrated(opinionated_pruner(setup.model)).at(0.6)


def test_frozen_agents_keep_what_is_kept_most_often_by_the_tokens_of_answers(setup):
    agents = agents_of(setup)
    policy = frozen(agents, setup)
    keep = read_prompts(setup.model, setup.tokenizer, setup.prompts, agents).keep
    tokens = setup.answer_tokens
    assert len(set(tokens)) > 1
    for logits, site in zip(policy.logits, keep, strict=True):
        often = [sum(n * k for n, k in zip(tokens, unit, strict=True)) / sum(tokens) for unit in site.T.tolist()]
        assert logits.tolist() == pytest.approx(often)
    at = setup.calibrated(replace(agents, policy=policy)).at(0.6)
    assert float(keep_ratio(at.keep([x[None] for x in policy.logits], at.budget.geometries))) >= 0.6 - 1e-6


def test_shuffled_agents_decide_by_another_prompt_whatever_the_batch(setup):
    agents = agents_of(setup)
    policy = shuffled(agents, setup)
    read = read_prompts(setup.model, setup.tokenizer, setup.prompts, agents)
    own, got = agents.policy(read.features), policy(read.features)
    rows = [torch.cat([x[i] for x in own]) for i in range(12)]
    for i in range(12):
        drawn = torch.cat([x[i] for x in got])
        twins = [j for j in range(12) if drawn.equal(rows[j])]
        assert twins, "the logits are those of no held-out prompt"
        assert any(j != i for j in twins)
        alone = policy([x[i : i + 1] for x in read.features])
        torch.testing.assert_close(torch.cat([x[0] for x in alone]), drawn)
    assert sum(not torch.cat([x[i] for x in got]).equal(rows[i]) for i in range(12)) > 6
    with pytest.raises(ConfigError, match="features of one prompt were given to shuffle; hold out at least two"):
        Shuffled(agents.policy, [x[:1] for x in read.features])


def test_controls_are_rows_of_a_comparison(folder, made, tmp_path):  # noqa: F811
    few = "--limit 3 --max-new-tokens 3 --num-runs 2 --timed-prompts 2 --seeds 0,1".split()
    flags = ["--keep-ratios", "0.6", "--at-keep-ratio", "0.6", *few, "--output-dir", tmp_path]
    controls = ["--policies", "equal-time,frozen,shuffled,taylor,norm"]
    done = run("--model-path", folder, *controls, *flags, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    rows = {row["policy"]: row for row in data["rows"]}
    assert list(rows)[-1] == "equal-time"  # it needs the others' times
    assert rows["static_baseline"]["keep_ratio"] <= rows["equal-time"]["keep_ratio"] <= 1
    assert rows["equal-time"]["agents_to_this"]["diff"] == pytest.approx(
        rows["agents"]["accuracy"] - rows["equal-time"]["accuracy"]
    )
    assert {row["request"]["prompts"] for row in data["rows"]} == {2}
    assert len({row["request"]["tokens"] for row in data["rows"]}) == 1
    assert rows["static_baseline"]["request"]["n"] == 4  # two repetitions of each seed
    assert rows["frozen"]["request"]["charged"] == ["reading", "steps"]
    assert rows["shuffled"]["request"]["charged"] == ["reading", "decision", "slicing", "steps"]
    assert rows["dense"]["latency"]["kv_bytes"] >= max(row["latency"]["kv_bytes"] for row in data["rows"])
    assert data["effort"]["norm"] == {"trained": False, "examples": 128}
    again = json.loads(run("--model-path", folder, *controls, *flags, "--json").stdout)
    assert again["rows"] == data["rows"]
    refused = run("--model-path", folder, "--policies", "equal-time", *FEW, "--json")
    assert refused.exit_code == 2
    assert "num_runs=0 was given with the control 'equal-time', which needs times" in refused.stderr
