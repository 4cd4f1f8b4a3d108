"""How much accuracy a keep plan keeps: the frozen model beside the dense one and the one that decides per prompt."""

from collections.abc import Callable
from dataclasses import replace

from microglia.evaluation.run import Evaluation, paired
from microglia.evaluation.setup import Setup
from microglia.export.frozen import frozen
from microglia.export.plan import KeepPlan
from microglia.pruner import Pruner
from microglia.results import FrozenAccuracy


def accuracy_kept(
    setup: Setup, plan: KeepPlan, pruner: Pruner, progress: Callable[[str, int, int], None] | None = None
) -> FrozenAccuracy:
    """Summaries of `dense`, `adaptive` and `frozen` on the same examples; frozen paired with each of the others.

    The frozen model reads the prompt with its kept heads too, as the exported one does. `progress(name, done,
    total)` is called after every batch.
    """

    def run(name: str, pruner: Pruner | None) -> Evaluation:
        return setup.answers(pruner, (lambda done, total: progress(name, done, total)) if progress else None)

    runs = {"dense": run("dense", None), "adaptive": run("adaptive", pruner)}
    with frozen(setup.model, plan, pruner.recovery):
        answered = run("frozen", None)
    answers = tuple(replace(answer, keep_ratio=plan.keep_ratio) for answer in answered.answers)
    runs["frozen"] = replace(answered, answers=answers)
    return FrozenAccuracy(
        dataset=setup.task.name,
        **{name: run.summary() for name, run in runs.items()},
        paired=paired(runs["dense"], runs["frozen"]),
        paired_adaptive=paired(runs["adaptive"], runs["frozen"]),
    )
