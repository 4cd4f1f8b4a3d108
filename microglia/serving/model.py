"""The pruned model as the server uses it. All that the server asks of the pruning core is in this file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from microglia.anatomy import causal_lm, context_length
from microglia.execution import Execution, execution_for
from microglia.generation import answering
from microglia.pruner import Pruner
from microglia.reading import encode_prompts, read_prompts
from microglia.serving.job import Job, Pruning
from microglia.serving.rows import AnswerRow, StopRows
from microglia.serving.sampling import SampleRows
from microglia.settings import end_tokens, merged
from microglia.units import Geometry


@dataclass(frozen=True)
class PrunedModel:
    """A model with its pruner and how decisions are carried out. Only one thread at a time may let it write.

    template: the prompt with `{question}` of a model without a chat template. Raises ConfigError for an unknown
    execution, UnsupportedModelError for a model that it cannot follow.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pruner: Pruner
    template: str = "{question}"
    execution: str | Execution = "compact"

    def __post_init__(self) -> None:
        _ = self.executor  # here, not at the first requests, of which two threads could each make one

    @cached_property
    def lm(self) -> Any:
        return causal_lm(self.model)

    @cached_property
    def executor(self) -> Execution:
        """The execution, made once: what it captures serves all requests."""
        return execution_for(self.execution, self.lm)

    @cached_property
    def geometries(self) -> list[Geometry]:
        return [site.geometry for site in self.pruner.sites(self.model)]

    @cached_property
    def heads(self) -> int:
        """Heads of all sites."""
        return sum(geometry.count for geometry in self.geometries)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer that the model can hold; None when it does not say."""
        return context_length(self.lm)

    def pruning(self, prune: bool, keep_ratio: float | None) -> Pruning:
        """How a prompt is pruned. Raises ConfigError when there are no prompts to calibrate a keep ratio on."""
        if not (prune and self.executor.prunes):
            return Pruning(None)
        return Pruning(self.pruner.at(keep_ratio).gate.threshold)

    def count_kept_heads(self, jobs: Sequence[Job]) -> None:
        """Give each job the heads that its prompt will keep, and their number per site; one dense pass, no answer."""
        logits = read_prompts(self.model, self.tokenizer, [job.prompt for job in jobs], self.pruner).logits
        for row, job in enumerate(jobs):
            pruner = self.pruner.with_threshold(job.pruning.threshold or 0.0)
            keep = pruner.keep([x[row : row + 1] for x in logits], self.geometries)
            job.kept_heads = tuple(int(k.sum()) for k in keep)
            job.mask = torch.cat([k.flatten() for k in keep]).bool().numpy().tobytes()

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs of equal pruning as one batch and write their answers, emitting them as they grow.

        The end of an answer is emitted at once, whatever its neighbours still do. Raises whatever reading or writing
        raises; jobs that have ended by then have their answers.
        """
        start, threshold = time.monotonic(), jobs[0].pruning.threshold
        longest = max(job.sampling.max_new_tokens for job in jobs)
        batch = encode_prompts(self.lm, self.tokenizer, [job.prompt for job in jobs], longest)
        rows = [AnswerRow(job, self.tokenizer, ids) for job, ids in zip(jobs, batch["input_ids"], strict=True)]
        pruner = None if threshold is None else self.pruner.with_threshold(threshold)

        def kept_heads() -> list[int]:
            if trace is None:
                return [self.heads] * len(rows)
            return torch.stack([k.sum(-1) for k in trace.keep]).sum(0).int().tolist()

        ends = end_tokens(self.lm, self.tokenizer)
        stop_rows = StopRows(rows, {*ends}, kept_heads, self.heads, start)
        options = {
            "max_new_tokens": longest,
            "logits_processor": LogitsProcessorList([SampleRows(rows)]),  # rows that sample, each with its own seed
            "stopping_criteria": StoppingCriteriaList([stop_rows]),
        }
        settings = merged(self.lm, self.tokenizer, options, pruned=pruner is not None)
        with answering(self.lm, pruner, self.executor, settings, batch["attention_mask"]) as (trace, prepared, writer):
            writer.generate(**batch, **prepared.cache_option, **settings.options)
