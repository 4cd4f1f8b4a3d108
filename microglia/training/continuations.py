"""What the dense model itself writes after prompts: the targets of a training without labels, written once and kept.

A continuation is ids, never a text that is tokenised again: a text does not say which tokens wrote it. One that the
limit of length cut off gets no end token, so nothing is learned that the model did not say.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from microglia import processes, store
from microglia.anatomy import causal_lm
from microglia.anatomy.projection import stored_tensors
from microglia.cache import cache_folder
from microglia.errors import DataError, check_range
from microglia.generation import generate
from microglia.passes import Row
from microglia.settings import end_tokens
from microglia.tasks.base import Example, Task
from microglia.tasks.prompts import check_characters, example_prompt, prompt_ids
from microglia.training.config import TrainingConfig
from microglia.training.progress import bar

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prompt and of what was written after it; finished: it ends with a token that ends an answer."""

    prompt_ids: list[int]
    answer_ids: list[int]
    finished: bool


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Continuation]:
    """What the dense model writes after complete prompts (as `render_prompt` makes them), in their order.

    temperature: 0 is greedy; above it tokens are drawn from the whole distribution, and what a prompt gets depends on
    the prompt and the seed, not on its batch. What microglia's cache holds, by the model's weights, settings and the
    prompt's ids, is not written again, so whoever was interrupted goes on. `progress(done, total)` is called after
    every batch. In several processes each writes its share. Raises ConfigError for a temperature or limit that cannot
    be, DataError for a prompt that does not fit.
    """
    check_range("max_new_tokens", max_new_tokens, 1, 2**20)
    check_range("temperature", temperature, 0, 100)
    for prompt in prompts:
        check_characters(prompt)
    lm = causal_lm(model)
    ids = prompt_ids(tokenizer, prompts)
    ends = sorted(end_tokens(lm, tokenizer))
    settings = {"weights": weights_checksum(lm), "max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"ends": ends, "seed": seed if temperature else 0}
    path = cache_folder("continuations") / f"{digest(settings)}.jsonl"
    keys = [digest(row) for row in ids]
    known = processes.agreed(lambda: _read(path))
    missing = {key: index for index, key in reversed([*enumerate(keys)]) if key not in known}
    order = sorted(missing.values(), key=lambda index: (len(ids[index]), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = len(prompts) - len(order)

    def write(rows: list[int]) -> dict[str, tuple[list[int], bool]]:
        nonlocal done
        chosen = [Drawn(temperature, [f"{seed} {keys[i]}" for i in rows], max_new_tokens)] if temperature else None
        written = generate(
            lm, tokenizer, [prompts[i] for i in rows], max_new_tokens=max_new_tokens, logits_processor=chosen
        )
        answers = [row[:length] for row, length in zip(written.tokens.tolist(), written.lengths, strict=True)]
        new = {keys[i]: (answer, answer[-1] in ends) for i, answer in zip(rows, answers, strict=True)}
        store.append(path, [{"prompt": key, "answer": a, "finished": end} for key, (a, end) in new.items()])
        done = min(len(prompts), done + len(rows) * processes.count())
        if progress:
            progress(done, len(prompts))
        return new

    for part in processes.shared_out(batches, write):
        known |= part
    return [Continuation(row, *known[key]) for row, key in zip(ids, keys, strict=True)]


def continued(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    config: TrainingConfig,
    *,
    quiet: bool = True,
) -> list[Row]:
    """Token ids of every example's prompt and of the dense model's continuation, as `passes.encode` gives answers."""
    prompts = [example_prompt(tokenizer, example, task.template) for example in examples]
    with bar("dense model writes", quiet=quiet) as progress:
        written = continuations(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.continuation_tokens,
            temperature=config.continuation_temperature,
            seed=config.seed,
            progress=progress,
        )
    return [{"prompt": c.prompt_ids, "answer": c.answer_ids} for c in written]


def weights_checksum(model: nn.Module) -> str:
    """The same for models of one class with the same weights in the same precision, and for no others."""
    digest = hashlib.sha256(type(causal_lm(model)).__name__.encode())
    for name, tensor in sorted(causal_lm(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored_tensors(tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def digest(value: Any) -> str:
    """A short name for anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, tuple[list[int], bool]]:
    try:
        rows = store.read(path) if path.exists() else []
        return {row["prompt"]: (row["answer"], row["finished"]) for _, row in rows}
    except KeyError as error:
        raise DataError(f"{path} has a row without {error}, so it holds no continuations; delete it") from error


class Drawn(LogitsProcessor):
    """Draws from softmax(logits / temperature) by one uniform number per row and step, which the row's name decides.

    transformers draws rows from one stream of random numbers, so that a prompt's answer would depend on its batch.
    """

    def __init__(self, temperature: float, names: Sequence[str], steps: int) -> None:
        self.temperature, self.step = temperature, 0
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) for name in names]
        self.uniform = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) → 0 at the token that was drawn, minus infinity elsewhere."""
        sums = (scores.float() / self.temperature).softmax(-1).double().cumsum(-1)  # (B, V)
        drawn = self.uniform[:, self.step].double().to(sums.device)[:, None] * sums[:, -1:]
        self.step += 1
        token = torch.searchsorted(sums, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
