"""What a criterion may look at: a model, and prompts with their worked answers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.attach import gated
from microglia.errors import ConfigError, DataError
from microglia.generation import prompt_logits
from microglia.geometry import HeadGeometry
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import Site, causal_lm, find_sites, input_device
from microglia.tasks.base import Example, Task
from microglia.tasks.prompts import example_prompt
from microglia.training.data import Batch, Collator, encode
from microglia.training.loss import task_loss
from microglia.training.passes import read_prompt, write_answer


@dataclass(frozen=True, eq=False)
class Calibration:
    """Examples on a model, and the passes over them that criteria share.

    Every pass is made as inference makes it: the prompt dense, the answer with gated heads. bucket is the gate's.
    Raises DataError when there is no example, ConfigError for a batch size below 1.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    look: Look = field(default_factory=Look)
    bucket: int | None = None
    batch_size: int = 16
    seed: int = 0

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
        return find_sites(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return input_device(self.lm)

    @property
    def geometries(self) -> list[HeadGeometry]:
        return [site.geometry for site in self.sites]

    @cached_property
    def batches(self) -> list[Batch]:
        """The examples in order, `batch_size` at a time, on the model's device."""
        room = getattr(self.lm.config, "max_position_embeddings", None)
        rows = list(encode(self.tokenizer, self.examples, self.task.template, room))
        if bare := [e.id for e, row in zip(self.examples, rows, strict=True) if len(row["answer"]) < 2]:
            raise DataError(f"example {bare[0]} has no answer to calibrate on; give every example a worked answer")
        collate = Collator(self.tokenizer.pad_token_id or 0)
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [Batch(**{name: x.to(self.device) for name, x in collate(part).items()}) for part in parts]

    def keeps(self, value: float = 1.0, rows: int = 1) -> list[Tensor]:
        """The same keep for every head: (rows, H) per site."""
        return [torch.full((rows, g.heads), value, device=self.device) for g in self.geometries]

    def losses(self, batch: Batch, keep: Sequence[Tensor] | None = None, *, prompt: Any = None) -> Tensor:
        """Loss per answer token of each row, (B,), when its answer is written with `keep` (B, H) or (1, H) per site.

        `prompt` is what `read` returned, to read the prompts once for many keeps; it stays as it is. Gradients reach
        the keeps, and what the answer's positions do with the weights.
        """
        first = self.read(batch) if prompt is None else copy.deepcopy(prompt)
        with gated(self.sites, self.keeps() if keep is None else keep):
            logits = write_answer(self.lm, batch, first)
        return torch.stack(
            [task_loss(row[None], labels[None]) for row, labels in zip(logits, batch.labels, strict=True)]
        )

    @torch.no_grad()
    def read(self, batch: Batch) -> Any:
        """The model's output, with its cache, for the batch's prompts."""
        return read_prompt(self.lm, batch)

    def keep_gradients(self) -> list[Tensor]:
        """∂loss/∂keep of each of N examples at keep 1: (N, H) per site, on the CPU."""
        parts = []
        for batch in self.batches:
            keep = [k.requires_grad_() for k in self.keeps(rows=len(batch.prompt))]
            parts.append([g.float().cpu() for g in torch.autograd.grad(self.losses(batch, keep).sum(), keep)])
        return [torch.cat(site) for site in zip(*parts, strict=True)]

    @torch.no_grad()
    def visit_outputs(self, visit: Callable[[Site, Tensor], None]) -> None:
        """`visit(site, outputs)` for every batch and site: the heads' outputs (N, H, D) at the answers' N tokens."""

        def hook(site: Site, batch: Batch) -> Callable[..., None]:
            fed = batch.answer_mask[:, 1:].bool()  # the last token of an answer predicts nothing
            return lambda _, inputs: visit(site, site.geometry.split(inputs[0])[fed])

        for batch in self.batches:
            first = self.read(batch)
            hooks = [site.output.register_forward_pre_hook(hook(site, batch)) for site in self.sites]
            try:
                write_answer(self.lm, batch, first)
            finally:
                for handle in hooks:
                    handle.remove()

    def logits(self, policy: Policy) -> list[Tensor]:
        """What `policy` says of each of N prompts: logits (N, H) per site, on the CPU."""
        prompts = [example_prompt(self.tokenizer, e, self.task.template) for e in self.examples]
        return prompt_logits(self.lm, self.tokenizer, prompts, policy, look=self.look, batch_size=self.batch_size)


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
