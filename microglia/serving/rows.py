"""The rows of a batch while their answers are written: text as it grows, and when each of them ends."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from microglia.serving.job import Finished, Job, Reason
from microglia.serving.text import GrowingText
from microglia.tasks.prompts import ChatPrompt

NEIGHBOURS = 4  # tokens of the prompt beside which a completion is decoded


class AnswerRow:
    """One answer while it is written, behind the prompt's ids (T,)."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> None:
        self.job, self.tokens, self.done = job, 0, False
        before = [] if isinstance(job.prompt, ChatPrompt) else prompt[-NEIGHBOURS:].tolist()  # a turn stands alone
        self.text, device = GrowingText(tokenizer, job.sampling.stop, before), prompt.device
        self.generator: torch.Generator | None = None
        if not job.sampling.greedy:
            self.generator = torch.Generator(device)
            seed = job.sampling.seed
            self.generator.manual_seed(seed) if seed is not None else self.generator.seed()

    def add(self, token: int, end_tokens: set[int]) -> Reason | None:
        """One more token; the reason to finish if there is one. That nobody waits any more is one."""
        self.tokens += 1
        self.job.emit_text(self.text.add(token))
        if token in end_tokens or self.text.stopped or self.job.cancelled:
            return "stop"
        return "length" if self.tokens >= self.job.sampling.max_new_tokens else None


class StopRows(StoppingCriteria):
    """Called after every token: emits each row's new text, and ends the rows that are done.

    kept_heads: gives the heads that each row keeps, summed over sites, once the prompts have been read; heads: of the
    whole model; start: when reading them began.
    """

    def __init__(
        self,
        rows: Sequence[AnswerRow],
        end_tokens: set[int],
        kept_heads: Callable[[], Sequence[int]],
        heads: int,
        start: float,
    ) -> None:
        self.rows, self.end_tokens, self.heads, self.start = rows, end_tokens, heads, start
        self.kept_heads = cache(kept_heads)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Ids (B, T) with the new token last → which rows are done, (B,)."""
        for row, token, kept_heads in zip(self.rows, input_ids[:, -1].tolist(), self.kept_heads(), strict=True):
            if row.done or (reason := row.add(token, self.end_tokens)) is None:
                continue
            row.done = True
            row.job.emit_text(row.text.rest())
            waiting, seconds = self.start - row.job.arrival, time.monotonic() - self.start
            row.job.end(Finished(reason, row.tokens, kept_heads, self.heads, waiting, seconds))
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)
