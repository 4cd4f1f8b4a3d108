"""Activation norm: how much each unit writes, on average over the prompt. And its mean output, which may replace it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.signals.base import Prompt, Signal, token_count
from microglia.units import ProjectedSite, Site

FEW = 2**20  # norms of a site that may wait: of a longer prompt they are averaged at once, as memory then counts


def mean_norm(outputs: Tensor, tokens: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over prompt tokens of the L2 norm of each head's output.

    `outputs` (B, T, H, D); `tokens` (B, T), true at prompt tokens (not at padding). `count` (B, 1) says how many they
    are; a caller with many sites computes it once, and gives tokens as float32. Returns (B, H) in float32.
    """
    weight = tokens.float()
    return averaged(norms_of(outputs), weight, token_count(weight) if count is None else count)


def norms_of(outputs: Tensor) -> Tensor:
    """L2 norms (B, T, H) in float32 of outputs (B, T, H, D)."""
    # Half precision is summed in float32 without a copy of the outputs; float64 stays and is rounded at the end.
    exact = torch.promote_types(outputs.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(outputs, dim=-1, dtype=exact)
    return norms.float()


def averaged(norms: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Mean over prompt tokens of norms (…, B, T, H), by `weight` (B, T) and `count` (B, 1): (…, B, H)."""
    return (norms * weight[..., None]).sum(-2) / count


class OutputSignal(Signal):
    """A signal of what every unit gives to the output projection."""

    unit: ClassVar[str] = "head"

    def of_outputs(self, outputs: Tensor, prompt: Prompt) -> Any:
        """Units' outputs (B, T, U, D) → the value, or what becomes it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures; define of_outputs")

    @contextmanager
    def measure(self, site: Site, prompt: Prompt, put: Callable[[Any], None]) -> Iterator[None]:
        assert isinstance(site, ProjectedSite)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                put(self.of_outputs(site.split(inputs[0]), prompt))

        handle = site.output.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class WaitingNorms:
    """Norms (B, T, H) of one site of a prompt, not averaged yet."""

    norms: Tensor
    prompt: Prompt


class Norm(OutputSignal):
    """Mean L2 norm of the head's output."""

    name: ClassVar[str] = "norm"
    usual: ClassVar[bool] = True

    def of_outputs(self, outputs: Tensor, prompt: Prompt) -> Any:
        norms = norms_of(outputs)
        if norms.numel() <= FEW:
            return WaitingNorms(norms, prompt)
        return averaged(norms, prompt.weight, prompt.count)

    def finish(self, values: Sequence[Any]) -> list[Tensor]:
        """Norms of all sites are averaged together: at each of them they would be three more small kernels."""
        finished = list(values)
        kinds: dict[Any, list[int]] = {}
        for index, value in enumerate(values):
            if isinstance(value, WaitingNorms):
                kinds.setdefault((value.norms.shape, value.norms.device), []).append(index)
        with torch.no_grad():
            for places in kinds.values():
                prompt = values[places[0]].prompt
                together = torch.stack([values[index].norms for index in places])
                means = averaged(together, prompt.weight, prompt.count)
                for index, mean in zip(places, means.unbind(), strict=True):
                    finished[index] = mean
        return finished

    def score(self, values: Tensor) -> Tensor:
        """Relative to the site's mean: norms grow with depth."""
        return values / values.mean(-1, keepdim=True).clamp(min=1e-20)


class MeanOutput(OutputSignal):
    """Mean output of each unit over the prompt, (B, U, D): what a pruned one may leave behind. No feature."""

    name: ClassVar[str] = "mean_output"

    def of_outputs(self, outputs: Tensor, prompt: Prompt) -> Tensor:
        weight = prompt.weight.to(outputs.dtype)
        return torch.einsum("bthd,bt->bhd", outputs, weight / weight.sum(1, keepdim=True))

    def score(self, values: Tensor) -> Tensor:
        """Not a score: units are not ranked by it."""
        raise NotImplementedError("a mean output ranks no units")


class MeanActivation(MeanOutput):
    """The same of blocks of channels."""

    name: ClassVar[str] = "mean_activation"
    unit: ClassVar[str] = "channel"


MEANS: tuple[MeanOutput, ...] = (MeanOutput(), MeanActivation())
