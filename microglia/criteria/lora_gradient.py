"""LoRA gradients: importance of frozen weights from the gradients of small adapters only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from microglia.criteria.base import CRITERIA, Criterion, check_positive
from microglia.criteria.calibration import Calibration
from microglia.criteria.descent import turns
from microglia.criteria.weights import by_head, matrices
from microglia.errors import ConfigError
from microglia.units import HeadSite


@CRITERIA.register("lora_gradient")
@dataclass(frozen=True, kw_only=True)
class LoraGradient(Criterion):
    """Σ over the head's slices of (G ⊙ (W + BA))², where G stands in for ∂loss/∂W; a moving average over steps."""

    steps: int = 20
    rank: int = 8
    learning_rate: float = 1e-3
    decay: float = 0.9

    name: ClassVar[str] = "lora_gradient"
    examples: ClassVar[int] = 512
    score: ClassVar[str] = "Σ ((∂loss/∂B·A + B·∂loss/∂A − ∂loss/∂B·∂loss/∂A) ⊙ (W + BA))² over the head's slices"
    paper: ClassVar[str] = "Zhang et al. 2024, LoRAPrune"
    departs: ClassVar[str] = "adapters on attention only, thrown away afterwards; scored once, not pruned step by step"

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, rank=self.rank, learning_rate=self.learning_rate)
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay={self.decay} was given; it must be 0 or more and below 1")

    def scores(self, calibration: Calibration) -> list[Tensor]:
        weights = [matrices(site) for site in calibration.heads]
        adapters = [{name: adapter(w, self.rank) for name, w in site.items()} for site in weights]
        flat = [x for site in adapters for pair in site.values() for x in pair]
        averages = [torch.zeros(g.count) for g in calibration.geometries]
        optimiser = torch.optim.Adam(flat, self.learning_rate)
        with adapted(calibration.heads, adapters):
            for _, batch in turns(calibration, self.steps):
                optimiser.zero_grad()
                calibration.losses(batch).mean().backward()
                for site, pairs, w in zip(calibration.heads, adapters, weights, strict=True):
                    squares = by_head(site, {name: importance(w[name], *pair) for name, pair in pairs.items()})
                    averages[site.index].lerp_(squares.sums().cpu(), 1 - self.decay)
                optimiser.step()
        return averages


def adapter(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of LoRA on a weight (out, in), as LoRA starts: B is zero, so nothing changes."""
    a = torch.empty(rank, weight.shape[1], device=weight.device).uniform_(-1, 1) / weight.shape[1] ** 0.5
    return a.requires_grad_(), torch.zeros(len(weight), rank, device=weight.device, requires_grad=True)


@torch.no_grad()
def importance(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared change of the loss, to first order, if an entry of the adapted weight (out, in) went: (out, in)."""
    return (slope(a, b, a.grad, b.grad) * (weight + b @ a)).square()  # type: ignore[arg-type]


def slope(a: Tensor, b: Tensor, a_grad: Tensor, b_grad: Tensor) -> Tensor:
    """By how much BA falls in one step of plain gradient descent: what stands in for ∂loss/∂W."""
    return b_grad @ a + b @ a_grad - b_grad @ a_grad


@contextmanager
def adapted(sites: Sequence[HeadSite], adapters: Sequence[dict[str, tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """While inside, every projection adds what its adapter says."""

    def hook(a: Tensor, b: Tensor) -> Any:
        return lambda _, inputs, output: output + (inputs[0].to(a) @ a.T @ b.T).to(output)

    handles = [
        getattr(site.attention, name).register_forward_hook(hook(*pair))
        for site, pairs in zip(sites, adapters, strict=True)
        for name, pair in pairs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
