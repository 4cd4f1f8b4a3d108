"""The static baseline of the agents: one free logit per unit and no input, with the same loss, steps and data."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia.gate import Gate
from microglia.policies import StaticPolicy
from microglia.pruner import Fill, Pruner
from microglia.tasks.base import Task
from microglia.training.config import TrainingConfig
from microglia.training.loop import RunFolder, TrainingResult, train
from microglia.units import find_sites

LEARNING_RATE = 0.1  # of a free logit per unit; that of an MLP would leave it where it began


def baseline_config(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """The agents' own training, for free logits, with a recovery where they have one. `changes` are made last."""
    return replace(
        config,
        **{
            "learning_rate": LEARNING_RATE,
            "lora": "none",
            "patience": 0,
            "report_to": "none",
            "gradient_checkpointing": False,
            **changes,
        },
    )


def new_static_baseline(model: nn.Module, gate: Gate | None = None, fill: Fill = "zero") -> Pruner:
    """A static baseline for a model, before training: every unit kept."""
    policy = StaticPolicy.all_kept([site.geometry for site in find_sites(model)])
    return Pruner(policy, gate or Gate(), fill=fill)


def train_in_memory(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    pruner: Pruner,
    config: TrainingConfig,
    *,
    data_dir: Path | None = None,
    quiet: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train the pruner's policy in place and leave no files."""
    config = replace(config, save_steps=10_000_000)  # nobody would go on from a folder that goes
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder, quiet=quiet, on_log=on_log)
        return train(model, tokenizer, task, pruner, config, run, data_dir=data_dir)
