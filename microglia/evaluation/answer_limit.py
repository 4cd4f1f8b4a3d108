"""How long an answer may get before it is cut, measured by its worked answer.

A model that lost too much may never stop, and one such answer keeps its whole batch waiting until `max_new_tokens`.
Where answers are written as the data write them, one that is a good deal longer than its worked answer has gone astray.
What there is of it is judged. The limit depends on the example alone, never on its batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from microglia.errors import ConfigError
from microglia.tasks.base import Example
from microglia.tasks.prompts import generated_answer_prefix

SPARE = 8  # tokens beyond the limit, so that short answers have some slack too


def limits(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], ratio: float | None, max_new_tokens: int
) -> list[int]:
    """The most new tokens of each example's answer: `ratio` times its worked answer and 8 more, or `max_new_tokens`.

    Raises ConfigError for a ratio below 1.
    """
    if ratio is None:
        return [max_new_tokens] * len(examples)
    if not ratio >= 1:
        raise ConfigError(f"answer_limit={ratio} was given; it must be 1 or more, as 1 is the worked answer itself")
    prefix = generated_answer_prefix(tokenizer)
    worked = tokenizer([prefix + example.answer for example in examples], add_special_tokens=False)["input_ids"]
    return [min(max_new_tokens, math.ceil(ratio * (len(ids) + 1)) + SPARE) for ids in worked]


class Cut(StoppingCriteria):
    """Stops every row of a batch at its own number of new tokens."""

    def __init__(self, most: Sequence[int]) -> None:
        self.most, self.prompt = torch.tensor(most), 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.prompt = self.prompt or input_ids.shape[1] - 1  # it is asked first when one token is new
        return (self.most <= input_ids.shape[1] - self.prompt).to(input_ids.device)


def stopping_at(most: Sequence[int]) -> StoppingCriteriaList:
    """Criteria by which row i of a batch gets at most `most[i]` new tokens."""
    return StoppingCriteriaList([Cut(most)])
