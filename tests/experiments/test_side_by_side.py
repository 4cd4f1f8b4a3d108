"""Agents and static baseline of a seed: trained once, alike, and loaded again."""

from dataclasses import replace

import pytest
import torch

import microglia.training.static_baseline
from microglia.checkpoint import Checkpoint
from microglia.errors import CheckpointError
from microglia.evaluation.setup import Setup
from microglia.experiments.side_by_side import AGENTS, BASELINE, PairRecipe, saved_pair
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import TrainingConfig
from tests.tiny import geometries_of
from tests.tiny_folder import save_tiny_model

FEW = {"max_steps": 2, "limit": 8, "batch_size": 4, "eval_limit": 2}
SHORT = TrainingConfig(**FEW, learning_rate=0.1, keep_ratio=0.6)
RECIPE = PairRecipe(SHORT, replace(SHORT, learning_rate=1e-2))


@pytest.fixture
def setup(tmp_path) -> Setup:
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path / "model"))
    task = get_task("arithmetic")
    return Setup(system.model, system.tokenizer, task, task.load("validation", limit=3))


def test_a_pair_is_trained_alike_and_only_once(setup, tmp_path, monkeypatch) -> None:
    real, runs = microglia.training.static_baseline.train, []

    def recorded(model, tokenizer, task, pruner, config, *rest, **options):
        starts = pruner.policy([torch.randn(1, 2 * g.heads) for g in geometries_of(model)])
        runs.append((pruner.policy.name, config, [x[0].detach().clone() for x in starts]))
        return real(model, tokenizer, task, pruner, config, *rest, **options)

    monkeypatch.setattr(microglia.training.static_baseline, "train", recorded)
    pair = saved_pair(setup, RECIPE, 3, tmp_path / "3", base_model="tiny")
    kinds, configs, starts = zip(*runs, strict=True)
    assert kinds == ("static", "mixture", "static")
    assert [config.seed for config in configs] == [6, 7, 7]
    assert [config.learning_rate for config in configs] == [0.1, 1e-2, 0.05]
    assert replace(configs[1], learning_rate=1) == replace(configs[2], learning_rate=1)
    clipped = [x.clamp(-1, 1) for x in starts[2]]  # from the baseline's logits
    torch.testing.assert_close(starts[1], clipped)
    assert {place.name for place in (tmp_path / "3").iterdir()} == {AGENTS, BASELINE}

    again = saved_pair(setup, RECIPE, 3, tmp_path / "3", base_model="tiny")
    assert len(runs) == 3
    assert again.agents.fingerprint() == pair.agents.fingerprint()
    assert again.static_baseline.fingerprint() == pair.static_baseline.fingerprint()
    saved = [Checkpoint.from_pretrained(tmp_path / "3" / name) for name in (AGENTS, BASELINE)]
    assert [checkpoint.config.policy for checkpoint in saved] == ["mixture", "static"]
    assert [checkpoint.pruner.budget.prompts for checkpoint in saved] == [3, 3]
    other = saved_pair(setup, RECIPE, 4, tmp_path / "4", base_model="tiny")
    assert other.agents.fingerprint() != pair.agents.fingerprint()


def test_a_pair_of_another_recipe_is_refused(setup, tmp_path) -> None:
    saved_pair(setup, RECIPE, 0, tmp_path / "pair", base_model="tiny")
    message = "was trained by another recipe; give another --output-dir"
    for other in (PairRecipe(SHORT, replace(SHORT, max_steps=3)), replace(RECIPE, policy="agents")):
        with pytest.raises(CheckpointError, match=message):
            saved_pair(setup, other, 0, tmp_path / "pair", base_model="tiny")
