"""Agents and static baseline of a seed: trained once, alike, and loaded again."""

from dataclasses import replace

import pytest
import torch

import microglia.training.static_baseline
from microglia.checkpoint import Checkpoint
from microglia.errors import CheckpointError
from microglia.evaluation.bench import Bench
from microglia.experiments.side_by_side import AGENTS, BASELINE, PairRecipe, saved_pair
from microglia.sites import find_sites
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import TrainingConfig
from tests.tiny_folder import save_tiny_model

SHORT = TrainingConfig(max_steps=2, limit=8, batch_size=4, eval_limit=2, learning_rate=0.1, keep_ratio=0.6)
RECIPE = PairRecipe(SHORT, replace(SHORT, learning_rate=1e-2))


@pytest.fixture
def bench(tmp_path) -> Bench:
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path / "model"))
    task = get_task("arithmetic")
    return Bench(system.model, system.tokenizer, task, task.load("validation", limit=3))


def test_a_pair_is_trained_alike_and_only_once(bench, tmp_path, monkeypatch) -> None:
    real, runs = microglia.training.static_baseline.train, []

    def watched(model, tokenizer, task, policy, config, **options):
        geometries = [site.geometry for site in find_sites(model)]
        starts = policy([torch.randn(1, 2 * g.heads) for g in geometries])
        runs.append((type(policy).__name__, config, [x[0].detach().clone() for x in starts]))
        return real(model, tokenizer, task, policy, config, **options)

    monkeypatch.setattr(microglia.training.static_baseline, "train", watched)
    pair = saved_pair(bench, RECIPE, 3, tmp_path / "3", base_model="tiny")
    kinds, configs, starts = zip(*runs, strict=True)
    assert kinds == ("StaticPolicy", "MixturePolicy", "StaticPolicy")
    assert [config.seed for config in configs] == [6, 7, 7]
    assert [config.learning_rate for config in configs] == [0.1, 1e-2, 0.05]
    assert replace(configs[1], learning_rate=1) == replace(configs[2], learning_rate=1)
    torch.testing.assert_close(starts[1], [x.clamp(-1, 1) for x in starts[2]])  # from the baseline's logits, clipped
    assert {place.name for place in (tmp_path / "3").iterdir()} == {AGENTS, BASELINE}

    again = saved_pair(bench, RECIPE, 3, tmp_path / "3", base_model="tiny")
    assert len(runs) == 3
    assert again.agents.fingerprint() == pair.agents.fingerprint()
    assert again.static_baseline.fingerprint() == pair.static_baseline.fingerprint()
    assert {Checkpoint.from_pretrained(tmp_path / "3" / n).config.policy for n in (AGENTS, BASELINE)} == {
        "mixture",
        "static",
    }
    other = saved_pair(bench, RECIPE, 4, tmp_path / "4", base_model="tiny")
    assert other.agents.fingerprint() != pair.agents.fingerprint()


def test_a_pair_of_another_recipe_is_refused(bench, tmp_path) -> None:
    saved_pair(bench, RECIPE, 0, tmp_path / "pair", base_model="tiny")
    for other in (PairRecipe(SHORT, replace(SHORT, max_steps=3)), replace(RECIPE, policy="agents")):
        with pytest.raises(CheckpointError, match="was trained by another recipe; give another --output-dir"):
            saved_pair(bench, other, 0, tmp_path / "pair", base_model="tiny")
