"""One bench for everything that is compared: the same model, prompts, template and code path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.evaluation.run import Answer, Evaluation, evaluate
from microglia.gate import Gate
from microglia.generation import prompt_logits
from microglia.look import Look
from microglia.policy import Policy
from microglia.tasks.base import Example, Task
from microglia.tasks.prompts import example_prompt


@dataclass(frozen=True)
class Bench:
    """Examples of a task on a model, and how every policy is put to them."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    look: Look = field(default_factory=Look)
    fill: str = "zero"
    scope: str = "answer"
    path: str = "compact"
    batch_size: int = 32
    max_new_tokens: int = 256
    answer_room: float | None = None

    @property
    def prompts(self) -> list[str]:
        """What the model reads."""
        return [example_prompt(self.tokenizer, example, self.task.template) for example in self.examples]

    def answers(
        self, policy: Policy | None, gate: Gate | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Greedy answers to all examples, dense when `policy` is None."""
        return evaluate(
            self.model,
            self.tokenizer,
            self.task,
            self.examples,
            policy,
            gate=gate,
            look=self.look,
            fill=self.fill,
            scope=self.scope,
            path=self.path,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            answer_room=self.answer_room,
            progress=progress,
        )

    def logits(self, policy: Policy) -> list[Tensor]:
        """What `policy` says of each of the N prompts, nothing generated: (N, H) per site."""
        return prompt_logits(
            self.model, self.tokenizer, self.prompts, policy, look=self.look, batch_size=self.batch_size
        )


def as_json(run: Evaluation) -> dict[str, Any]:
    """An evaluation for a ledger."""
    return {"answers": run.rows(), "seconds": run.seconds}


def from_json(row: dict[str, Any]) -> Evaluation:
    """The evaluation that `as_json` wrote."""
    return Evaluation(tuple(Answer(**answer) for answer in row["answers"]), row["seconds"])
