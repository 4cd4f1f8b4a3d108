"""Prompts that a chat model asks itself: what it writes where its template lets the user speak.

Magpie, Xu et al. 2024.
"""

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia import processes, store
from microglia.anatomy import causal_lm
from microglia.cache import cache_folder
from microglia.checkpoint import write_atomically
from microglia.errors import ConfigError
from microglia.generation import generate
from microglia.settings import end_tokens
from microglia.tasks.base import Task
from microglia.tasks.prompts import ChatPrompt, uses_chat_template
from microglia.tasks.unlabelled import PromptsTask
from microglia.training.config import TrainingConfig
from microglia.training.continuations import Drawn, Progress, digest, weights_checksum
from microglia.training.progress import bar

TEMPERATURE = 1.0
LONGEST = 128  # tokens of a user's turn: of 3,072 turns of SmolLM2 77 % ended within 90
AT_ONCE = 64
TRIES = 4  # turns per prompt wanted; a model that ends fewer of them is no chat model


def ask_itself(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """A JSON-lines file with `count` prompts, all different, for the task `prompts`.

    Turns are sampled from the dense model and kept in microglia's cache by its weights and the seed,
    so that whoever was interrupted, or wants more, goes on; turns that do not end are left out. Raises ConfigError for
    a tokenizer without a chat template, or when three of four turns end nowhere or repeat each other.
    """
    lm, opening = causal_lm(model), _opening(tokenizer)
    ends = set(end_tokens(lm, tokenizer))
    name = digest({"weights": weights_checksum(lm), "opening": opening, "seed": seed, "longest": LONGEST})
    folder = cache_folder("self-prompts")
    turns = folder / f"{name}-turns.jsonl"
    known = processes.agreed(lambda: [row["prompt"] for _, row in store.read(turns)] if turns.exists() else [])
    while len(asked := _different(known)) < count:
        if len(known) >= TRIES * (count + AT_ONCE):
            raise ConfigError(
                f"of {len(known)} turns that the model began as a user only {len(asked)} were complete and different, "
                f"but self_prompts={count} was given; give prompts of your own with --data-dir"
            )
        seeds = [f"{seed} turn {index}" for index in range(len(known), len(known) + AT_ONCE)]
        written = generate(
            lm,
            tokenizer,
            [opening] * AT_ONCE,
            max_new_tokens=LONGEST,
            logits_processor=[Drawn(TEMPERATURE, seeds, LONGEST)],
        )
        last = [row[length - 1] for row, length in zip(written.tokens.tolist(), written.lengths, strict=True)]
        new = [text.strip() if end in ends else "" for text, end in zip(written.texts, last, strict=True)]
        if processes.is_first():
            store.append(turns, [{"prompt": text} for text in new])
        known += new
        if progress:
            progress(min(len(_different(known)), count), count)
    path = folder / f"{name}-{count}.jsonl"
    if processes.is_first():
        rows = (json.dumps({"prompt": text}, ensure_ascii=False) for text in asked[:count])
        write_atomically(path, "\n".join(rows).encode() + b"\n")
    processes.wait()
    return path


def with_self_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainingConfig,
    data_dir: Path | str | None,
    *,
    quiet: bool = True,
) -> str:
    """The sources of the task `prompts` with those that the model asks itself among them; alone where none are given.

    Raises ConfigError for another task, whose data directory holds no prompts.
    """
    if task.name != PromptsTask.name:
        raise ConfigError(
            f"self_prompts={config.self_prompts} was given with the task {task.name}; use --dataset prompts "
            f"--data-dir {task.name}, which mixes them with that task's prompts"
        )
    with bar("model asks itself", quiet=quiet) as progress:
        asked = ask_itself(model, tokenizer, config.self_prompts, seed=config.seed, progress=progress)
    return ",".join([*([str(data_dir)] if data_dir else []), str(asked)])


def _different(turns: list[str]) -> list[str]:
    return [text for text in dict.fromkeys(turns) if text]


def _opening(tokenizer: PreTrainedTokenizerBase) -> ChatPrompt:
    """The chat template's text up to where the first user speaks."""
    if not uses_chat_template(tokenizer):
        raise ConfigError(
            "self_prompts was given, but the tokenizer has no chat template; give prompts with --data-dir"
        )
    mark = "What is 3 + 4?"
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    return ChatPrompt(text.partition(mark)[0])
