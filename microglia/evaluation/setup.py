"""One setup for everything that is compared: the same model, prompts, template and execution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length, input_device
from microglia.evaluation.batches import Progress
from microglia.evaluation.run import Evaluation, evaluate
from microglia.execution import Execution
from microglia.ledger import Ledger
from microglia.passes import answer_logits, batch_of, encode
from microglia.pruner import Pruner
from microglia.reading import read_prompts
from microglia.tasks.base import Example, Task
from microglia.tasks.prompts import example_prompt, worked_answers
from microglia.tasks.used import fingerprint
from microglia.training.loss import answer_losses
from microglia.units import step_costs


@dataclass(frozen=True)
class Setup:
    """Examples of a task on a model, and how every pruner is put to them.

    answer_limit: answers longer than so many times their worked answer are cut; see `evaluation.answer_limit`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    execution: str | Execution = "compact"
    batch_size: int = 32
    max_new_tokens: int = 256
    answer_limit: float | None = None

    @property
    def prompts(self) -> list[str]:
        """What the model reads."""
        return [example_prompt(self.tokenizer, example, self.task.template) for example in self.examples]

    @property
    def identity(self) -> dict[str, Any]:
        """What answers to these examples depend on beside the model's name and the pruner, for ledgers; JSON-ready."""
        execution = self.execution if isinstance(self.execution, str) else self.execution.name
        weights = {f"{type(p.data).__name__} {p.dtype}" for p in causal_lm(self.model).parameters()}
        return {
            "task": self.task.name,
            "examples": fingerprint(self.examples, self.prompts),
            "weights": sorted(weights),
            "execution": execution,
            "max_new_tokens": self.max_new_tokens,
            "answer_limit": self.answer_limit,
        }

    def answers(
        self, pruner: Pruner | None, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> Evaluation:
        """Greedy answers to all examples, dense without a pruner; finished batches are kept in the ledger."""
        return evaluate(self, pruner, progress, ledger)

    def logits(self, pruner: Pruner) -> list[Tensor]:
        """What the policy says of each of the N prompts, nothing generated: (N, U) per site, on the CPU."""
        return read_prompts(self.model, self.tokenizer, self.prompts, pruner, batch_size=self.batch_size).logits

    @property
    def answer_tokens(self) -> list[int]:
        """How many tokens each example's worked answer has, which is what its prompt counts for where time counts."""
        return [len(ids) for ids in worked_answers(self.tokenizer, self.examples)]

    def calibrated(self, pruner: Pruner, answer_tokens: Sequence[int] | None = None) -> Pruner:
        """The pruner with a budget from these prompts, weighted by the tokens of their answers (None: worked ones)."""
        weights = torch.tensor(self.answer_tokens if answer_tokens is None else answer_tokens).float()
        sites = pruner.sites(self.model)
        geometries, costs = [site.geometry for site in sites], step_costs(self.model, sites)
        return pruner.with_budget(self.logits(pruner), geometries, weights, costs=costs)

    @torch.no_grad()
    def losses(self, pruner: Pruner | None) -> list[float]:
        """Mean cross entropy per token of each worked answer, in nats: what a pruning costs before it costs answers.

        Made as inference makes it: prompts are read with every unit, answers with those that are kept.
        """
        lm = causal_lm(self.model)
        rows = encode(self.tokenizer, self.examples, self.task.template, context_length(lm))
        losses = list[float]()
        for start in range(0, len(rows), self.batch_size):
            batch = batch_of(rows[start : start + self.batch_size], input_device(lm))
            logits, _ = answer_logits(lm, batch, pruner)
            losses += answer_losses(logits, batch.labels).tolist()
        return losses
