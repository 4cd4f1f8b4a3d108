"""What is benchmarked: prompts, and the pruner that decides on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microglia.anatomy import Anatomy
from microglia.benchmark.pattern import PatternPolicy, random_keep
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate
from microglia.pruner import Pruner


@dataclass(frozen=True)
class Prompted:
    """Prompts (B, T) and the pruner that decides on them."""

    ids: Tensor
    pruner: Pruner


Subject = Callable[[int, int, float | None], Prompted]  # of batch size, context and keep ratio


def random_subject(model: Any, *, per_row: bool = False, seed: int = 0) -> Subject:
    """Random tokens and random patterns of a keep ratio; one pattern for all rows, or one for each."""
    anatomy = Anatomy(model)
    geometries = [layer.heads for layer in anatomy.layers]

    def subject(batch: int, context: int, keep_ratio: float | None) -> Prompted:
        if keep_ratio is None:
            raise ConfigError("random weights decide nothing by themselves; give keep_ratio")
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(anatomy.vocab_size, (batch, context), generator=generator)
        keep = random_keep(geometries, keep_ratio, rows=batch if per_row else 1, seed=seed)
        return Prompted(ids, Pruner(PatternPolicy(geometries, keep), Gate(bucket=1)))

    return subject


def text_subject(pruner: Pruner, tokenizer: Any, texts: Sequence[str], *, per_row: bool = False) -> Subject:
    """A pruner on real text, cut to the context: the same text in all rows, or another one in each."""

    def subject(batch: int, context: int, keep_ratio: float | None) -> Prompted:
        rows = batch if per_row else 1
        tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
        if len(tokens) < rows * context:
            raise DataError(
                f"{rows} prompts of {context} tokens were asked for, but the texts have {len(tokens)} tokens; give "
                "more text, a smaller batch or a shorter context"
            )
        ids = torch.tensor(tokens[: rows * context]).view(rows, context)
        return Prompted(ids.expand(batch, -1).contiguous(), pruner.at(keep_ratio))

    return subject
