"""The model writes the answers of one batch: every row with its own heads, sampling, stop texts and end."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from microglia.attach import Trace, attached
from microglia.compact import compacted
from microglia.errors import ConfigError
from microglia.gate import Gate, threshold_for
from microglia.generation import encode_prompts, prompt_logits
from microglia.look import Look
from microglia.policy import Policy
from microglia.serving.job import Finished, Job, Pruning, Reason, Sampling
from microglia.serving.text import GrowingText
from microglia.sites import Site, causal_lm, find_sites


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
    scope: str = "answer"
    template: str = "{question}"
    calibration: Sequence[Tensor] = ()

    @cached_property
    def lm(self) -> Any:
        return causal_lm(self.model)

    @cached_property
    def sites(self) -> Sequence[Site]:
        return find_sites(self.model)

    @cached_property
    def heads(self) -> int:
        """Heads of all sites."""
        return sum(site.geometry.heads for site in self.sites)

    @property
    def room(self) -> int | None:
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
        geometries = [site.geometry for site in self.sites]
        return Pruning(threshold_for(self.calibration, geometries, keep_ratio, self.gate.bucket))

    def look_at(self, jobs: Sequence[Job]) -> None:
        """Give each job the number of heads that its prompt will keep per site; one dense pass, nothing is written."""
        logits = prompt_logits(self.model, self.tokenizer, [job.prompt for job in jobs], self.policy, look=self.look)
        gates = [replace(self.gate, threshold=job.pruning.threshold or 0.0) for job in jobs]
        for row, (job, gate) in enumerate(zip(jobs, gates, strict=True)):
            keep = gate.every([x[row : row + 1] for x in logits], [site.geometry for site in self.sites])
            job.counts = tuple(int(k.sum()) for k in keep)

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs that are pruned alike as one batch and write their answers, telling each as it goes.

        An answer is told the moment it ends, whatever its neighbours still do. Raises whatever reading or writing
        raises; jobs that have ended by then have their answers.
        """
        started = time.monotonic()
        threshold = jobs[0].pruning.threshold
        longest = max(job.sampling.max_new_tokens for job in jobs)
        batch = encode_prompts(self.lm, self.tokenizer, [job.prompt for job in jobs], longest)
        rows = [_Row(job, self.tokenizer, batch["input_ids"].device) for job in jobs]
        context = (
            attached(
                self.lm,
                self.policy,
                gate=replace(self.gate, threshold=threshold),
                look=self.look,
                fill=self.fill,
                scope=self.scope,
                pruning=compacted,
            )
            if threshold is not None
            else nullcontext(Trace())
        )
        with context as trace:
            self.lm.generate(
                **batch,
                max_new_tokens=longest,
                do_sample=False,  # rows that sample do so in _Draw, each with its own seed
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([_Draw(rows)]),
                stopping_criteria=StoppingCriteriaList([_Told(rows, trace, self.heads, self._ends(), started)]),
            )

    def _ends(self) -> set[int]:
        """The tokens that end an answer: those that the model's own `generate` stops at, else the tokenizer's."""
        ends = self.lm.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return {ends} if isinstance(ends, int) else {*(ends or ())}


class _Row:
    """One answer while it is written."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.job, self.tokens, self.done = job, 0, False
        self.text = GrowingText(tokenizer, job.sampling.stop)
        self.generator: torch.Generator | None = None
        if not job.sampling.greedy:
            self.generator = torch.Generator(device)
            seed = job.sampling.seed
            self.generator.manual_seed(seed) if seed is not None else self.generator.seed()

    def add(self, token: int, ends: set[int]) -> Reason | None:
        """One more token; the reason to finish if there is one. That nobody waits any more is one."""
        self.tokens += 1
        self.job.piece(self.text.add(token))
        if token in ends or self.text.stopped or self.job.cancelled:
            return "stop"
        return "length" if self.tokens >= self.job.sampling.max_new_tokens else None


class _Draw(LogitsProcessor):
    """Rows that sample draw their token here, so that a row's draw depends on its own seed and not on the batch."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) → the same, in sampling rows 0 at the drawn token and −∞ elsewhere, so that greedy takes it."""
        for index, row in enumerate(self.rows):
            if row.generator is None or row.done:
                continue
            token = drawn(scores[index : index + 1], row.job.sampling, row.generator)
            scores[index] = -torch.inf
            scores[index, token] = 0
        return scores


def drawn(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from scores (1, V) by temperature and nucleus."""
    scores = scores / sampling.temperature
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(scores.new_empty(0), scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class _Told(StoppingCriteria):
    """Called after every token: tells each row's new text, and ends the rows that are done."""

    def __init__(self, rows: Sequence[_Row], trace: Trace, heads: int, ends: set[int], started: float) -> None:
        self.rows, self.trace, self.heads, self.ends, self.started = rows, trace, heads, ends, started
        self.kept: list[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Ids (B, T) with the new token last → which rows are done, (B,)."""
        if self.kept is None:
            keep = self.trace.keep
            counts = sum(k.sum(-1) for k in keep) if keep else torch.full((len(self.rows),), self.heads)
            self.kept = [int(count) for count in counts.tolist()]  # type: ignore[union-attr]
        for row, token, kept in zip(self.rows, input_ids[:, -1].tolist(), self.kept, strict=True):
            if row.done:
                continue
            reason = row.add(token, self.ends)
            if reason is None:
                continue
            row.done = True
            row.job.piece(row.text.rest())
            now = time.monotonic()
            row.job.end(
                Finished(reason, row.tokens, kept, self.heads, self.started - row.job.arrived, now - self.started)
            )
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)
