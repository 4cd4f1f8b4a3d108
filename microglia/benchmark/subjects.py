"""What is benchmarked: prompts, and the pruner that decides on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microglia.anatomy import Anatomy
from microglia.benchmark.pattern import PatternPolicy, keep_ratio_for, random_keep
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate
from microglia.pruner import Pruner
from microglia.signals import usual_signals
from microglia.units import find_sites, step_costs


@dataclass(frozen=True)
class Prompted:
    """Prompts (B, T) and the pruner that decides on them."""

    ids: Tensor
    pruner: Pruner


# Of batch size and context, and of a keep ratio or, as `byte_share`, a share of the bytes of a dense step.
Subject = Callable[..., Prompted]
RANDOM_UNITS = ("head", "channel")  # that a share of the bytes is taken from: both in the same proportion


def random_subject(model: Any, *, per_row: bool = False, seed: int = 0) -> Subject:
    """Random tokens and random patterns; one pattern for all rows, or one for each.

    At a keep ratio heads go, at a share of the bytes heads and channels do.
    """
    anatomy = Anatomy(model)

    def subject(
        batch: int, context: int, keep_ratio: float | None = None, *, byte_share: float | None = None
    ) -> Prompted:
        units = ("head",) if byte_share is None else RANDOM_UNITS
        sites = find_sites(model, units)
        geometries = [site.geometry for site in sites]
        if byte_share is not None:
            keep_ratio = keep_ratio_for(geometries, step_costs(model, sites, batch=batch, context=context), byte_share)
        if keep_ratio is None:
            raise ConfigError("random weights decide nothing by themselves; give keep_ratio")
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(anatomy.vocab_size, (batch, context), generator=generator)
        keep = random_keep(geometries, keep_ratio, rows=batch if per_row else 1, seed=seed)
        return Prompted(ids, Pruner(PatternPolicy(geometries, keep, usual_signals(units)), Gate(bucket=1), units=units))

    return subject


def text_subject(pruner: Pruner, tokenizer: Any, texts: Sequence[str], *, per_row: bool = False) -> Subject:
    """A pruner on real text, cut to the context: the same text in all rows, or another one in each."""

    def subject(
        batch: int, context: int, keep_ratio: float | None = None, *, byte_share: float | None = None
    ) -> Prompted:
        rows = batch if per_row else 1
        tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
        if len(tokens) < rows * context:
            raise DataError(
                f"{rows} prompts of {context} tokens were asked for, but the texts have {len(tokens)} tokens; give "
                "more text, a smaller batch or a shorter context"
            )
        ids = torch.tensor(tokens[: rows * context]).view(rows, context)
        return Prompted(ids.expand(batch, -1).contiguous(), pruner.at(keep_ratio, byte_share=byte_share))

    return subject
