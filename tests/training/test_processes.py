"""Two processes make the run that one makes: the same batches, the same noise, the same weights up to rounding."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from microglia import processes
from microglia.errors import ConfigError
from microglia.training import TrainingConfig
from microglia.training.loop import SETTINGS
from tests.pair import start_pair
from tests.training.test_training import tiny_run

# 13 examples in batches of 4: the last batch of an epoch has one row, and one of the processes none.
BASE = TrainingConfig(
    max_steps=5, batch_size=4, limit=13, eval_limit=5, save_steps=3, warmup_steps=0, noise=(1.0, 1.0), target="gold"
)
RUNS = {
    "agents": BASE,
    "per example": replace(BASE, keep_ratio=0.5, ramp=0.0, target="0.5", loss_per="example"),
    "steered": replace(BASE, keep_ratio=0.5, ramp=0.0, beta=0.1),
    "lora": replace(BASE, lora="joint", lora_rank=2, target="0.5"),
    "stopped early": replace(BASE, max_steps=40, eval_steps=2, patience=1, learning_rate=1e-9),
    "recovery": replace(BASE, target="model", continuation_tokens=6, recovery=2, recovery_start=0.4),
    "checkpointed": replace(BASE, gradient_checkpointing=True, max_steps=2),
    "bf16": replace(BASE, bf16=True, max_steps=2),
    "sharded": replace(BASE, shard=True),
    "sharded lora": replace(BASE, shard=True, lora="joint", lora_rank=2, max_steps=2),
}


def weights(result):
    adapters = {name: p for name, p in result.model.named_parameters() if "lora_" in name}
    recovery = result.pruner.recovery.state_dict() if result.pruner.recovery is not None else {}
    return {name: x.detach().clone() for name, x in (result.pruner.policy.state_dict() | adapters | recovery).items()}


def run_all(folder):
    """In each of the two processes: every run, one that is resumed, and one that may not be."""
    for name, config in RUNS.items():
        result = tiny_run(folder / name, config)[1]
        save_file(weights(result), folder / f"{name}-{processes.rank()}.safetensors")
    if processes.is_first():  # so that it goes on from the third step
        (folder / "agents" / "agents" / "checkpoint-5" / "trainer_state.json").unlink()
    processes.wait()
    again = tiny_run(folder / "agents", BASE, resume=True)[1]
    save_file(weights(again), folder / f"resumed-{processes.rank()}.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    start_pair(run_all, folder, preload=["tests.training.test_processes"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_with_the_weights_of_one(pair, tmp_path, name):
    alone = weights(tiny_run(tmp_path, RUNS[name])[1])
    first, second = (load_file(pair / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(second[key].equal(x) for key, x in first.items())
    far = {key: (first[key] - x).abs() for key, x in alone.items()}
    if name == "bf16":  # in other groups 16 bits round otherwise, and Adam makes whole steps of tiny gradients
        assert torch.cat([x.flatten() for x in far.values()]).quantile(0.99) < 1e-4
    else:
        assert max(float(x.max()) for x in far.values()) < 1e-4, far


@pytest.mark.slow
def test_a_resumed_pair_ends_with_the_same_weights(pair):
    for rank in (0, 1):
        whole, again = (load_file(pair / f"{name}-{rank}.safetensors") for name in ("agents", "resumed"))
        assert all(again[key].equal(x) for key, x in whole.items())


def test_a_pairs_run_is_not_resumed_alone(tmp_path):
    tiny_run(tmp_path, replace(BASE, max_steps=1))
    path = tmp_path / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    with pytest.raises(ConfigError, match=r"processes was 2 and is now 1\); resume with the same ones"):
        tiny_run(tmp_path, replace(BASE, max_steps=1), resume=True)
