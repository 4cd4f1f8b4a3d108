"""The static baseline: trained by the agents' training, on the calibration's examples, with nothing left behind."""

from dataclasses import replace

import pytest
import torch

from microglia.criteria.static_baseline import StaticBaseline
from microglia.criteria.trained import CalibrationTask, train_on
from microglia.errors import ConfigError
from microglia.policies import StaticPolicy
from microglia.training import RunFolder, TrainingConfig, train
from tests.criteria.calibrated import EXAMPLES, Sums, calibration

SHORT = TrainingConfig(max_steps=4, batch_size=2, learning_rate=0.1, warmup_steps=0, alpha=(0.5, 0.5), save_steps=1000)


def test_it_is_the_agents_training_without_input(tmp_path):
    cal = calibration("qwen2", seed=3)
    policy = StaticBaseline(config=SHORT).policy(cal)
    expected = StaticPolicy.all_kept(cal.geometries)
    config = replace(SHORT, seed=3)
    run = RunFolder(tmp_path, quiet=True)
    train(cal.model, cal.tokenizer, Sums(), cal.pruner(expected), config, run=run)
    assert all(a.equal(b) for a, b in zip(policy.logits, expected.logits, strict=True))
    assert not policy.logits[0].equal(torch.full((8,), 2.0))
    assert not any(p.requires_grad for p in policy.parameters())


def test_the_task_moves_every_head_but_one_that_says_nothing():
    cal = calibration("llama")
    with torch.no_grad():
        cal.lm.model.layers[1].self_attn.o_proj.weight[:, 12:18] = 0  # head 2
    for alpha in (0.0, 0.5):
        _, second = StaticBaseline(config=replace(SHORT, alpha=(alpha, alpha), noise=(0.0, 0.0), beta=0.0)).scores(cal)
        assert (second[2] == 2) == (alpha == 0)
        assert all(second[head] != 2 for head in range(8) if head != 2)


def test_it_trains_on_the_calibrations_examples():
    task = CalibrationTask(calibration(examples=EXAMPLES[1:3]))
    assert task.load("train") == task.load("validation") == EXAMPLES[1:3]
    assert task.load("train", limit=1) == EXAMPLES[1:2]
    assert task.template == "{question}"


def test_what_pruned_heads_leave_behind_is_trained_with():
    zero, mean = (StaticBaseline(config=SHORT).scores(replace(calibration(), fill=fill)) for fill in ("zero", "mean"))
    assert not any(a.equal(b) for a, b in zip(zero, mean, strict=True))


def test_the_model_cannot_be_changed_by_it():
    cal = calibration()
    with pytest.raises(ConfigError, match=r"lora='joint' was given, but a criterion leaves the model as it is"):
        train_on(cal, StaticPolicy.all_kept(cal.geometries), replace(SHORT, lora="joint"))
