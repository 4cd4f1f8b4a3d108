"""Drawing a row's next token, with its own seed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from microglia.serving.job import Sampling
from microglia.serving.rows import AnswerRow


def draw_token(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from scores (1, V) by temperature and nucleus."""
    scores = scores / sampling.temperature
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(scores.new_empty(0), scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class SampleRows(LogitsProcessor):
    """Rows that sample draw their token here, so that a row's draw depends on its own seed and not on the batch."""

    def __init__(self, rows: Sequence[AnswerRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) → the same, in sampling rows 0 at the drawn token and −∞ elsewhere, so that greedy takes it."""
        for index, row in enumerate(self.rows):
            if row.generator is not None and not row.done:
                token = draw_token(scores[index : index + 1], row.job.sampling, row.generator)
                scores[index] = -torch.inf
                scores[index, token] = 0
        return scores
