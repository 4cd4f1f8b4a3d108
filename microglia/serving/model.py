"""The pruned model as the server uses it. All that the server asks of the pruning core is in this file."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from microglia.attach import Trace, attached
from microglia.compact import compacted
from microglia.errors import ConfigError
from microglia.gate import Gate, threshold_for
from microglia.generation import encode_prompts, prompt_logits
from microglia.geometry import HeadGeometry
from microglia.look import Look
from microglia.policy import Policy
from microglia.serving.job import Job, Pruning
from microglia.serving.rows import AnswerRow, StopRows
from microglia.serving.sampling import SampleRows
from microglia.sites import causal_lm, find_sites


@dataclass(frozen=True)
class PrunedModel:
    """A model with the policy that prunes it, as a server needs them. Only one thread at a time may let it write.

    calibration: the policy's logits (N, H) per site on N prompts, from which a keep ratio becomes a threshold.
    template: the prompt with `{question}` of a model without a chat template.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    gate: Gate
    look: Look
    fill: str = "zero"
    template: str = "{question}"
    calibration: Sequence[Tensor] = ()

    @cached_property
    def lm(self) -> Any:
        return causal_lm(self.model)

    @cached_property
    def geometries(self) -> list[HeadGeometry]:
        return [site.geometry for site in find_sites(self.model)]

    @cached_property
    def heads(self) -> int:
        """Heads of all sites."""
        return sum(geometry.heads for geometry in self.geometries)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer that the model can hold; None when it does not say."""
        return getattr(self.lm.config, "max_position_embeddings", None)

    def pruning(self, prune: bool, keep_ratio: float | None) -> Pruning:
        """How a prompt is pruned. Raises ConfigError when there are no prompts to calibrate a keep ratio on."""
        if not prune:
            return Pruning(None)
        if keep_ratio is None:
            return Pruning(self.gate.threshold)
        if not len(self.calibration):
            raise ConfigError(
                f"keep_ratio={keep_ratio} was given, but this checkpoint has no prompts to calibrate it on; leave it "
                "out, or train the checkpoint again"
            )
        return Pruning(threshold_for(self.calibration, self.geometries, keep_ratio, self.gate.bucket))

    def count_kept_heads(self, jobs: Sequence[Job]) -> None:
        """Give each job the number of heads that its prompt will keep per site; one dense pass, nothing is written."""
        logits = prompt_logits(self.model, self.tokenizer, [job.prompt for job in jobs], self.policy, look=self.look)
        for row, job in enumerate(jobs):
            gate = replace(self.gate, threshold=job.pruning.threshold or 0.0)
            keep = gate.every([x[row : row + 1] for x in logits], self.geometries)
            job.kept_heads = tuple(int(k.sum()) for k in keep)

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs of equal pruning as one batch and write their answers, emitting them as they grow.

        The end of an answer is emitted at once, whatever its neighbours still do. Raises whatever reading or writing
        raises; jobs that have ended by then have their answers.
        """
        start = time.monotonic()
        longest = max(job.sampling.max_new_tokens for job in jobs)
        batch = encode_prompts(self.lm, self.tokenizer, [job.prompt for job in jobs], longest)
        rows = [AnswerRow(job, self.tokenizer, batch["input_ids"].device) for job in jobs]
        with self._attached(jobs[0].pruning) as trace:

            def kept_heads() -> list[int]:
                return sum(k.sum(-1) for k in trace.keep).tolist() if trace.keep else [self.heads] * len(rows)

            self.lm.generate(
                **batch,
                max_new_tokens=longest,
                do_sample=False,  # rows that sample do so in SampleRows, each with its own seed
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([SampleRows(rows)]),
                stopping_criteria=StoppingCriteriaList(
                    [StopRows(rows, self._end_tokens(), kept_heads, self.heads, start)]
                ),
            )

    def _attached(self, pruning: Pruning) -> Any:
        """The context in which the model is pruned so; its value is the trace of what was decided."""
        if pruning.threshold is None:
            return nullcontext(Trace())
        gate = replace(self.gate, threshold=pruning.threshold)
        return attached(self.lm, self.policy, gate=gate, look=self.look, fill=self.fill, pruning=compacted)

    def _end_tokens(self) -> set[int]:
        """The tokens that end an answer: those that the model's own `generate` stops at, else the tokenizer's."""
        ends = self.lm.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return {ends} if isinstance(ends, int) else {*(ends or ())}
