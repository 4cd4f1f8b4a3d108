"""The static baseline of the agents: one free logit per head and no input, with the same loss, steps and data."""

import tempfile
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia.policy import Policy, StaticPolicy
from microglia.sites import find_sites
from microglia.tasks.base import Task
from microglia.training.config import TrainingConfig
from microglia.training.loop import train

LEARNING_RATE = 0.1  # of a free logit per head; that of an MLP would leave it where it began


def baseline_config(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """The agents' own training, for free logits. `changes` are made last."""
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


def train_static_baseline(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainingConfig,
    *,
    baseline: StaticPolicy | None = None,
    **options: Any,
) -> StaticPolicy:
    """Train a static baseline, or train `baseline` further; `options` go to `train_in_memory`."""
    if baseline is None:
        baseline = StaticPolicy.all_kept([site.geometry for site in find_sites(model)])
    train_in_memory(model, tokenizer, task, baseline, config, **options)
    return baseline


def train_in_memory(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    policy: Policy,
    config: TrainingConfig,
    *,
    quiet: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train `policy` in place, leave no files, and return the history. `options` go to `train`."""
    config = replace(config, save_steps=10_000_000)  # nobody would go on from a folder that goes
    with tempfile.TemporaryDirectory() as folder:
        return train(model, tokenizer, task, policy, config, output_dir=folder, quiet=quiet, **options).history
