"""Logits become keep: temperature, soft or hard, buckets, rectangles, and never an empty site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microglia.errors import ConfigError
from microglia.geometry import HeadGeometry

MODES = ("hard", "straight-through", "soft")


@dataclass(frozen=True)
class Gate:
    """How logits (B, H) of one site become keep (B, H).

    mode: `hard` is {0, 1}. `straight-through` is hard in the forward pass and has the sigmoid's gradient (Bengio et al.
        2013; with logistic noise, the binary Concrete of Maddison et al. 2017). `soft` is the sigmoid, as in the
        original recipe.
    temperature: of the sigmoid, `keep = sigmoid(logits / temperature)`; hard decisions do not depend on it.
    threshold: a head is asked for when its logit exceeds it. 0 is keep > 0.5; the dial for a keep ratio moves it.
    bucket: counts per site are rounded up to multiples of it; None means an eighth of the heads.
    noise: scale of logistic noise on the logits while training.
    rows: which rows of a larger batch of `rows.stop` these are. Noise is then drawn for all of it, so that a row's
        noise does not depend on how many processes share the batch.
    """

    mode: str = "hard"
    temperature: float = 0.5
    threshold: float = 0.0
    bucket: int | None = None
    noise: float = 0.0
    rows: range | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"gate={self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} was given; it must be above 0")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError(f"bucket={self.bucket} was given; it must be at least 1")

    @property
    def trains(self) -> bool:
        """Whether gradients flow through the gates."""
        return self.mode != "hard"

    def __call__(self, logits: Tensor, geometry: HeadGeometry) -> Tensor:
        """(B, H) → keep (B, H), float, in {0, 1} unless soft."""
        if self.noise:
            uniform = torch.rand_like(logits.new_empty(self.rows.stop if self.rows else len(logits), logits.shape[1]))
            own = uniform if self.rows is None else uniform[self.rows.start :: self.rows.step]
            logits = logits + self.noise * torch.logit(own.clamp(1e-6, 1 - 1e-6))
        soft = torch.sigmoid((logits - self.threshold) / self.temperature)
        if self.mode == "soft":
            return soft
        hard = rectangle(logits - self.threshold, geometry, self.bucket).to(logits.dtype)
        return _StraightThrough.apply(soft, hard) if self.mode == "straight-through" else hard

    def every(self, logits: Sequence[Tensor], geometries: Sequence[HeadGeometry]) -> list[Tensor]:
        """Logits (B, H) of every site → keep (B, H) of every site.

        Sites with the same geometry go together where nothing is drawn: one by one their small sorts are a thousand
        kernels, which a GPU takes longer to launch than to read a short prompt.
        """
        alike = len(set(geometries)) == 1 and len({x.device for x in logits}) == 1
        if not alike or self.noise:
            return [self(x, geometry) for x, geometry in zip(logits, geometries, strict=True)]
        return list(self(torch.cat(list(logits)), geometries[0]).chunk(len(logits)))


class _StraightThrough(torch.autograd.Function):
    """Forward: hard, exactly. Backward: as if it were soft."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rectangle(scores: Tensor, geometry: HeadGeometry, bucket: int | None = None) -> Tensor:
    """Scores (B, H), above 0 = asked for → keep (B, H), boolean, rectangular and never empty.

    A row keeps its groups with at least one asked head (rounded up to the bucket, best groups first), and in each of
    them the same number of query heads: as many as hold the asked heads on average (rounded up, best heads first). In
    multi-head attention, where a group is a head, that is: the asked heads, rounded up to the bucket.
    """
    bucket = bucket or max(1, geometry.heads // 8)
    grouped = geometry.by_group(scores)  # (B, G, Q)
    best = grouped.amax(-1)  # (B, G)
    asked_groups = (best > 0).sum(-1).clamp(min=1)
    asked_heads = (scores > 0).sum(-1).clamp(min=1)
    groups = _round_up(asked_groups, max(1, bucket // geometry.queries_per_group)).clamp(max=geometry.kv_heads)
    queries = -(-asked_heads // asked_groups)
    queries = _round_up(queries, max(1, bucket // geometry.kv_heads)).clamp(max=geometry.queries_per_group)
    kept_groups = _rank(best) < groups[:, None]
    kept_queries = _rank(grouped) < queries[:, None, None]
    return (kept_groups[..., None] & kept_queries).flatten(-2)


def check_bucket(bucket: int | None, geometries: Sequence[HeadGeometry]) -> None:
    """Raise ConfigError for a bucket that no site can leave a head out of."""
    heads = min(geometry.heads for geometry in geometries)
    if bucket is not None and bucket >= heads:
        raise ConfigError(
            f"bucket={bucket} was given, but a site has {heads} heads, all of which would always be kept; give less"
        )


def _rank(scores: Tensor) -> Tensor:
    """0 for the best along the last dimension; ties go to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _round_up(counts: Tensor, multiple: int) -> Tensor:
    return -(-counts // multiple) * multiple


def keep_ratio(keep: Sequence[Tensor]) -> Tensor:
    """Keeps of all sites, (B, H) each → share of kept heads per row (B,)."""
    return sum(k.float().sum(-1) for k in keep) / sum(k.shape[-1] for k in keep)  # type: ignore[return-value]


def threshold_for(
    logits: Sequence[Tensor], geometries: Sequence[HeadGeometry], target: float, bucket: int | None = None
) -> float:
    """The threshold at which the mean keep ratio over prompts comes closest to `target` from above.

    `logits` holds (N, H) per site for N calibration prompts. One threshold for all prompts and sites: prompts still
    differ. Raises ConfigError for a target outside (0, 1].
    """
    if not 0 < target <= 1:
        raise ConfigError(f"keep_ratio={target} was given; it must be above 0 and at most 1")
    values = torch.cat([x.flatten() for x in logits]).double()
    low, high = float(values.min()) - 1, float(values.max()) + 1
    for _ in range(40):
        middle = (low + high) / 2
        # In the logits' own precision, as the gate will: in a finer one the last head could fall on the other side.
        keep = [rectangle(x - middle, g, bucket) for x, g in zip(logits, geometries, strict=True)]
        if float(keep_ratio(keep).mean()) >= target:
            low = middle
        else:
            high = middle
    below = values[values < low - 1e-6]
    # Halfway to the next lower logit: on the edge, rounding in another batch could cost the last head.
    return (low + float(below.max())) / 2 if len(below) else low - 1
