"""Examples become batches: prompts padded on the left, answers on the right, never mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from microglia.errors import DataError
from microglia.tasks.base import Example
from microglia.tasks.prompts import example_prompt, generated_answer_prefix, uses_chat_template

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Batch:
    """`prompt` (B, P) and `answer` (B, N) token ids with their masks; answers end with the end-of-text token."""

    prompt: Tensor
    prompt_mask: Tensor
    answer: Tensor
    answer_mask: Tensor

    @property
    def labels(self) -> Tensor:
        """Answer tokens, -100 at padding, (B, N)."""
        return self.answer.masked_fill(self.answer_mask == 0, -100)


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: str, max_length: int | None
) -> "Dataset":
    """Token ids of prompt and answer per example, and their total length. Examples that do not fit are an error."""
    from datasets import Dataset  # here, since importing it takes seconds

    special = not uses_chat_template(tokenizer)
    prompts = tokenizer([example_prompt(tokenizer, e, template) for e in examples], add_special_tokens=special)
    prefix = generated_answer_prefix(tokenizer)
    answers = tokenizer([prefix + e.answer for e in examples], add_special_tokens=False)
    rows: dict[str, list[Any]] = {"prompt": prompts["input_ids"], "answer": []}
    rows["answer"] = [[*ids, tokenizer.eos_token_id] for ids in answers["input_ids"]]
    rows["length"] = [len(p) + len(a) for p, a in zip(rows["prompt"], rows["answer"], strict=True)]
    for example, length in zip(examples, rows["length"], strict=True):
        if max_length is not None and length > max_length:
            raise DataError(
                f"example {example.id} has {length} tokens with its answer, but the model's context is {max_length}; "
                "leave it out"
            )
    return Dataset.from_dict(rows)


class Collator:
    """Rows of `encode` → one Batch as a dict of tensors (what a Trainer moves to the device)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest_prompt, longest_answer = (max(len(r[part]) for r in rows) for part in ("prompt", "answer"))
        batch = {
            "prompt": torch.full((len(rows), longest_prompt), self.pad),
            "prompt_mask": torch.zeros(len(rows), longest_prompt, dtype=torch.long),
            "answer": torch.full((len(rows), longest_answer), self.pad),
            "answer_mask": torch.zeros(len(rows), longest_answer, dtype=torch.long),
        }
        for i, row in enumerate(rows):
            p, a = torch.tensor(row["prompt"]), torch.tensor(row["answer"])
            batch["prompt"][i, longest_prompt - len(p) :], batch["prompt_mask"][i, longest_prompt - len(p) :] = p, 1
            batch["answer"][i, : len(a)], batch["answer_mask"][i, : len(a)] = a, 1
        return batch
