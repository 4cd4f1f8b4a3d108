"""Logits become keep: temperature, soft or hard, buckets, and never an empty site."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from microglia.errors import ConfigError, check_range
from microglia.registry import listed
from microglia.units import MOST_UNITS, Geometry, nested

Mode = Literal["hard", "straight-through", "soft"]


@dataclass(frozen=True)
class Gate:
    """How logits (B, U) of one site become keep (B, U).

    mode: `hard` is {0, 1}. `straight-through` is hard in the forward pass and has the sigmoid's gradient (Bengio et al.
        2013; with logistic noise, the binary Concrete of Maddison et al. 2017). `soft` is the sigmoid, as in the
        original recipe.
    temperature: of the sigmoid, `keep = sigmoid(logits / temperature)`; hard decisions do not depend on it.
    threshold: a unit is requested when its logit exceeds it. 0 is keep > 0.5; a Budget moves it.
    bucket: counts per site are rounded up to multiples of it; None means the geometry's own, an eighth of the heads.
    least_kept: share of every site's units that is kept in any case, the best ones; at least one unit always is.
    noise: scale of logistic noise on the logits while training.
    rows: which rows of a larger batch of `rows.stop` these are. Noise is then drawn for all of it, so that a row's
        noise does not depend on how many processes share the batch.
    """

    mode: Mode = "hard"
    temperature: float = 0.5
    threshold: float = 0.0
    bucket: int | None = None
    least_kept: float = 0.0
    noise: float = 0.0
    rows: range | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"gate mode {self.mode!r} is unknown; choose {listed(get_args(Mode))}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} was given; it must be above 0")
        if self.bucket is not None:
            check_range("bucket", self.bucket, 1, MOST_UNITS)
        check_range("least_kept", self.least_kept, 0, 1)

    @property
    def trains(self) -> bool:
        """Whether gradients flow through the gate."""
        return self.mode != "hard"

    def __call__(self, logits: Tensor, geometry: Geometry) -> Tensor:
        """(B, U) → keep (B, U), float, in {0, 1} unless soft."""
        if self.noise:
            uniform = torch.rand_like(logits.new_empty(self.rows.stop if self.rows else len(logits), logits.shape[1]))
            drawn = uniform if self.rows is None else uniform[self.rows.start :: self.rows.step]
            logits = logits + self.noise * torch.logit(drawn.clamp(1e-6, 1 - 1e-6))
        if self.mode == "soft":
            return self._soft(logits, geometry)
        hard = geometry.rectangle(self._requested(logits), self.bucket).to(logits.dtype)
        return hard if self.mode == "hard" else straight_through(self._soft(logits, geometry), hard)

    def _soft(self, logits: Tensor, geometry: Geometry) -> Tensor:
        soft = torch.sigmoid((logits - self.threshold) / self.temperature)
        if geometry.protected:
            soft = torch.cat([torch.ones_like(soft[:, : geometry.protected]), soft[:, geometry.protected :]], -1)
        return soft

    def _requested(self, logits: Tensor) -> Tensor:
        """Logits (B, U) less the threshold, above 0 for the units that are asked for, the least of them included."""
        scores = logits - self.threshold
        least = math.ceil(self.least_kept * scores.shape[-1])
        if not least:
            return scores
        # The order stays: those that were above 0 go up by one, the forced ones come to lie between.
        places = torch.linspace(1, 1 / least, least, dtype=scores.dtype, device=scores.device).expand(len(scores), -1)
        forced = torch.zeros_like(scores).scatter_(-1, logits.topk(least).indices, places)
        return torch.where(scores > 0, scores + 1, torch.where(forced > 0, forced, scores))

    def every(self, logits: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
        """Logits (B, U) of every site → keep (B, U) of every site.

        Sites with the same geometry go together where nothing is drawn: one by one their small sorts are a thousand
        kernels, which a GPU takes longer to launch than to read a short prompt. Heads and channels of a sublayer that
        goes go with it.
        """
        if self.noise:
            drawn = [self(x, geometry) for x, geometry in zip(logits, geometries, strict=True)]
            return nested(drawn, geometries)
        alike: dict[tuple[Geometry, torch.device], list[int]] = {}
        for index, (x, geometry) in enumerate(zip(logits, geometries, strict=True)):
            alike.setdefault((geometry, x.device), []).append(index)
        keep = list(logits)
        for (geometry, _), places in alike.items():
            together = self(torch.cat([logits[index] for index in places]), geometry).chunk(len(places))
            for index, part in zip(places, together, strict=True):
                keep[index] = part
        return nested(keep, geometries)

    def check_bucket(self, geometries: Sequence[Geometry]) -> None:
        """Raise ConfigError for a bucket under which every unit of some site would always be kept."""
        if self.bucket is None:
            return
        for geometry in set(geometries):
            last = torch.arange(geometry.count)[None] - geometry.count + 1.5  # above 0: the last unit alone
            if bool(geometry.rectangle(last, self.bucket).all()) and not bool(geometry.rectangle(last, 1).all()):
                raise ConfigError(
                    f"bucket={self.bucket} was given, but a site has {geometry.count} units, all of which would always "
                    "be kept; give less"
                )


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """Exactly `hard`, with the gradient of `soft` (Bengio et al. 2013)."""
    value: Tensor = _StraightThrough.apply(soft, hard)
    return value


class _StraightThrough(torch.autograd.Function):
    """Forward: hard, exactly. Backward: as if it were soft."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def keep_ratio(keep: Sequence[Tensor]) -> Tensor:
    """Keeps of all sites, (B, U) each → share of kept units per row (B,)."""
    kept = torch.stack([k.float().sum(-1) for k in keep]).sum(0)
    return kept / sum(k.shape[-1] for k in keep)


def rows_agree(keep: Sequence[Tensor]) -> bool:
    """Whether all rows decide the same on every site, so that they can share cut weights."""
    return all(bool((k == k[:1]).all()) for k in keep)
