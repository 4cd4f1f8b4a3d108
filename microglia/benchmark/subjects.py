"""What is benchmarked: prompts, and who decides on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microglia.benchmark.pattern import PatternPolicy, random_keep
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import find_sites


@dataclass(frozen=True)
class Prompted:
    """Prompts (B, T) and what decides on them."""

    ids: Tensor
    policy: Policy
    gate: Gate
    look: Look = field(default_factory=Look)


Subject = Callable[[int, int, float | None], Prompted]  # of batch size, context and keep ratio


def random_subject(lm: Any, *, per_row: bool = False, seed: int = 0) -> Subject:
    """Random tokens and random patterns of a keep ratio; one pattern for all rows, or one for each."""
    geometries = [site.geometry for site in find_sites(lm)]

    def subject(batch: int, context: int, keep_ratio: float | None) -> Prompted:
        if keep_ratio is None:
            raise ConfigError("random weights decide nothing by themselves; give keep_ratio")
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(lm.config.vocab_size, (batch, context), generator=generator)
        keep = random_keep(geometries, keep_ratio, rows=batch if per_row else 1, seed=seed)
        return Prompted(ids, PatternPolicy(geometries, keep), Gate(bucket=1))

    return subject


def text_subject(
    policy: Policy,
    gate_at: Callable[[float | None], Gate],
    tokenizer: Any,
    texts: Sequence[str],
    *,
    look: Look | None = None,
    per_row: bool = False,
) -> Subject:
    """A trained policy on real text, cut to the context: the same text in all rows, or another one in each.

    `gate_at` turns a keep ratio, None for the policy's own, into a gate.
    """

    def subject(batch: int, context: int, keep_ratio: float | None) -> Prompted:
        rows = batch if per_row else 1
        tokens: list[int] = []
        for text in texts:
            tokens += tokenizer(text)["input_ids"]
        if len(tokens) < rows * context:
            raise DataError(
                f"{rows} prompts of {context} tokens were asked for, but the texts have {len(tokens)} tokens; give "
                "more text, a smaller batch or a shorter context"
            )
        ids = torch.tensor(tokens[: rows * context]).view(rows, context)
        return Prompted(ids.expand(batch, -1).contiguous(), policy, gate_at(keep_ratio), look or Look())

    return subject
