"""Killed outright at random moments, resumed, and in the end the weights of a run that nobody disturbed.

MICROGLIA_KILLS=20 makes twenty trials; the default makes two.
"""

import multiprocessing
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save

from microglia.checkpoint import write_atomically
from microglia.training import TrainingConfig
from microglia.training.loop import SETTINGS

TRIALS = int(os.environ.get("MICROGLIA_KILLS", "2"))
# Four epochs of two steps: a run is resumed at every place of an epoch.
CONFIG = TrainingConfig(max_steps=8, batch_size=4, limit=8, eval_limit=4, save_steps=1, warmup_steps=0, target="gold")
RESULT = "result.safetensors"
PATIENCE = 600  # seconds; a slow machine is no failure


def run(folder):
    """In a process of its own: start the run in `folder`, or go on with the one that is there."""
    from tests.training.test_training import trained_policy

    torch.set_num_threads(1)
    policy = trained_policy(folder, CONFIG, resume=(folder / SETTINGS).exists())
    write_atomically(folder / RESULT, save(policy.state_dict()))


@pytest.fixture(scope="module")
def start():
    """A function that starts a run in a new process, which needs not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_training", "tests.training.test_killed"])

    def begin(folder):
        process = context.Process(target=run, args=(folder,), daemon=True)
        process.start()
        return process

    return begin


def finished(process):
    process.join(PATIENCE)
    return process.exitcode


@pytest.mark.slow
def test_kill_9_costs_nothing(start, tmp_path):
    assert finished(start(tmp_path / "warm")) == 0  # the first pays for the imports
    began = time.monotonic()
    assert finished(start(tmp_path / "whole")) == 0
    seconds = time.monotonic() - began
    truth = load_file(tmp_path / "whole" / RESULT)
    generator, killed, half_way = random.Random(0), 0, 0
    for trial in range(TRIALS):
        folder = tmp_path / f"trial-{trial}"
        for _ in range(2):  # twice, so that a resumed run is killed too
            process = start(folder)
            process.join(seconds * generator.random())
            process.kill()
            killed += finished(process) == -9
            half_way += any(folder.glob("agents/checkpoint-*")) and not (folder / RESULT).exists()
        assert finished(start(folder)) == 0, f"trial {trial} could not be resumed"
        weights = load_file(folder / RESULT)
        assert all(weights[name].equal(x) for name, x in truth.items()), f"trial {trial} ended with other weights"
    print(f"{TRIALS} trials: {killed} of {2 * TRIALS} runs were killed, {half_way} of them with a checkpoint to resume")
    assert killed >= TRIALS / 2  # else nothing was tried
    assert half_way  # nor was anything resumed
