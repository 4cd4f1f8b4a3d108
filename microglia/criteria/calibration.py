"""What a criterion learns from: a model, and prompts with their worked answers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length, input_device
from microglia.errors import ConfigError, DataError
from microglia.execution import Decision, Masked
from microglia.gate import Gate
from microglia.passes import Batch, batch_of, encode, read_prompt, write_answer
from microglia.policies import Policy
from microglia.pruner import Fill, Pruner
from microglia.reading import Reading, joined, read
from microglia.recovery import Recovery
from microglia.tasks.base import Example, Task
from microglia.training.config import TrainingConfig
from microglia.training.continuations import continued
from microglia.training.loss import answer_losses
from microglia.units import Arrangement, Geometry, HeadSite, ProjectedSite, Site, find_sites


@dataclass(frozen=True, eq=False)
class Calibration:
    """Examples on a model, and the passes over them that criteria share.

    Every pass is made as inference makes it: the prompt dense, the answer with gated units. units: the kinds that are
    scored. window, bucket, fill, least_kept, arrangement: of the pruners that come of it.
    Raises DataError when there is no example, ConfigError for a batch size below 1.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    window: int | None = 64
    bucket: int | None = None
    fill: Fill = "zero"
    batch_size: int = 16
    seed: int = 0
    least_kept: float = 0.0
    units: tuple[str, ...] = ("head",)
    arrangement: Arrangement = Arrangement()

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError("there is no example to calibrate on; give at least one")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} was given; it must be at least 1")

    @cached_property
    def lm(self) -> Any:
        return causal_lm(self.model)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return find_sites(self.model, self.units, self.arrangement)

    @property
    def projected(self) -> list[ProjectedSite]:
        """Those of the sites whose units write into one projection: heads and channels."""
        return [site for site in self.sites if isinstance(site, ProjectedSite)]

    @property
    def heads(self) -> list[HeadSite]:
        """Those of the sites that hold heads."""
        return [site for site in self.sites if isinstance(site, HeadSite)]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return input_device(self.lm)

    @property
    def geometries(self) -> list[Geometry]:
        return [site.geometry for site in self.sites]

    @cached_property
    def batches(self) -> list[Batch]:
        """The examples in order, `batch_size` at a time, on the model's device."""
        if not any(example.answer for example in self.examples):  # prompts alone: the dense model writes the answers
            rows = continued(self.lm, self.tokenizer, self.task, self.examples, TrainingConfig())
        else:
            rows = encode(self.tokenizer, self.examples, self.task.template, context_length(self.lm))
        if bare := [e.id for e, row in zip(self.examples, rows, strict=True) if len(row["answer"]) < 2]:
            raise DataError(f"example {bare[0]} has no answer to calibrate on; give every example a worked answer")
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [batch_of(part, self.device) for part in parts]

    def keeps(self, value: float = 1.0, rows: int = 1) -> list[Tensor]:
        """The same keep for every unit: (rows, U) per site."""
        return [torch.full((rows, g.count), value, device=self.device) for g in self.geometries]

    def losses(self, batch: Batch, keep: Sequence[Tensor] | None = None, *, prompt: Any = None) -> Tensor:
        """Loss per answer token of each row, (B,), when its answer is written with `keep` (B, U) or (1, U) per site.

        `prompt` is what `read` returned, to read the prompts once for many keeps; it stays as it is. Gradients reach
        the keeps, and what the answer's positions do with the weights.
        """
        first = self.read(batch) if prompt is None else copy.deepcopy(prompt)
        with Masked().apply(self.sites, Decision(self.keeps() if keep is None else keep)):
            logits = write_answer(self.lm, batch, first)
        return answer_losses(logits, batch.labels)

    @torch.no_grad()
    def read(self, batch: Batch) -> Any:
        """The model's output, with its cache, for the batch's prompts."""
        return read_prompt(self.lm, batch.prompt, batch.prompt_mask)

    def keep_gradients(self) -> list[Tensor]:
        """∂loss/∂keep of each of N examples at keep 1: (N, U) per site, on the CPU."""
        parts = []
        for batch in self.batches:
            keep = [k.requires_grad_() for k in self.keeps(rows=len(batch.prompt))]
            parts.append([g.float().cpu() for g in torch.autograd.grad(self.losses(batch, keep).sum(), keep)])
        return [torch.cat(site) for site in zip(*parts, strict=True)]

    @torch.no_grad()
    def visit_outputs(self, visit: Callable[[ProjectedSite, Tensor], None]) -> None:
        """`visit(site, outputs)` for every batch and site: its units' outputs (N, U, D) at the answers' N tokens."""

        def hook(site: ProjectedSite, batch: Batch) -> Callable[..., None]:
            fed = batch.answer_mask[:, 1:].bool()  # the last token of an answer predicts nothing
            return lambda _, inputs: visit(site, site.split(inputs[0])[fed])

        for batch in self.batches:
            first = self.read(batch)
            hooks = [site.output.register_forward_pre_hook(hook(site, batch)) for site in self.projected]
            try:
                write_answer(self.lm, batch, first)
            finally:
                for handle in hooks:
                    handle.remove()

    def logits(self, policy: Policy) -> list[Tensor]:
        """What `policy` says of each of N prompts: logits (N, U) per site, on the CPU."""
        return self.readings(policy).logits

    def pruner(self, policy: Policy, recovery: Recovery | None = None) -> Pruner:
        """A policy with the calibration's window, bucket, fill, least kept and arrangement."""
        gate = Gate(bucket=self.bucket, least_kept=self.least_kept)
        return Pruner(policy, gate, self.window, self.fill, self.units, recovery=recovery, arrangement=self.arrangement)

    def readings(self, policy: Policy) -> Reading:
        """What reading the N prompts gives with a policy, on the CPU."""
        pruner = self.pruner(policy.to(self.device))
        return joined([read(self.lm, batch.prompt, batch.prompt_mask, pruner).on_cpu() for batch in self.batches])


@contextmanager
def untouched(calibration: Calibration) -> Iterator[None]:
    """While inside, the model is frozen, in evaluation mode, and torch's random numbers are seeded; then as before."""
    model = calibration.model
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        device = calibration.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(calibration.seed)
            model.eval().requires_grad_(False)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)
