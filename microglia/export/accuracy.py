"""How much accuracy a keep plan keeps: the frozen model beside the dense one and the one that decides per prompt."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from microglia.evaluation.run import Evaluation, evaluate, paired
from microglia.export.frozen import frozen
from microglia.export.plan import KeepPlan
from microglia.policy import Policy
from microglia.results import FrozenAccuracy
from microglia.tasks import Example, Task


def accuracy_kept(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    plan: KeepPlan,
    policy: Policy,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    **adaptive: Any,
) -> FrozenAccuracy:
    """Summaries of `dense`, `adaptive` and `frozen` on the same examples; frozen paired with each of the others.

    `adaptive` options (gate, look, fill, scope) are those of the policy. The frozen model reads the prompt with its
    kept heads too, as the exported one does. `progress(name, done, total)` is called after every batch.
    """

    def run(name: str, policy: Policy | None, **options: Any) -> Evaluation:
        tell = (lambda done, total: progress(name, done, total)) if progress else None
        sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        return evaluate(model, tokenizer, task, examples, policy, progress=tell, **sizes, **options)

    runs = {"dense": run("dense", None), "adaptive": run("adaptive", policy, **adaptive)}
    with frozen(model, plan):
        answered = run("frozen", None)
    answers = tuple(replace(answer, keep_ratio=plan.keep_ratio) for answer in answered.answers)
    runs["frozen"] = replace(answered, answers=answers)
    return FrozenAccuracy(
        dataset=task.name,
        **{name: run.summary() for name, run in runs.items()},  # type: ignore[arg-type]
        paired=paired(runs["dense"], runs["frozen"]),
        paired_adaptive=paired(runs["adaptive"], runs["frozen"]),
    )
