"""What a promise can be about: how every setting is measured beside the dense model, and tested.

`accuracy` counts answers. The others suit models that answer too little right to tell settings apart, and need no gold
answers: they look at texts that the dense model wrote (or that the data hold), prompt by prompt, between 0 and 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import ClassVar

from microglia.evaluation.closeness import Closeness, closeness
from microglia.evaluation.likelihood import Pair
from microglia.evaluation.run import Evaluation
from microglia.evaluation.setup import Setup
from microglia.experiments.bounded import losses_needed, mean_limit, mean_p_value
from microglia.experiments.drop import drop_limit, drop_p_value, prompts_needed
from microglia.experiments.judge import check_answers, texts_of
from microglia.experiments.measure import Progress, answers
from microglia.ledger import Ledger
from microglia.pruner import Pruner
from microglia.results import Tried

MOST_KL = 1.0  # nats per token; a prompt above it counts as this much, since only a bounded loss can be promised


class Loss(ABC):
    """A loss on a setup's examples. ledger: within everything that the values depend on beside pruner and threshold."""

    needed: ClassVar[Callable[[float, float], int]]  # fewest prompts that could promise a drop with a confidence

    def __init__(self, setup: Setup, confidence: float, ledger: Ledger, progress: Progress | None) -> None:
        self.setup, self.confidence, self.ledger, self.progress = setup, confidence, ledger, progress

    @abstractmethod
    def tried(self, pruner: Pruner, target: float) -> Tried:
        """One setting, measured, with the limit of what it loses."""

    @abstractmethod
    def p_value(self, tried: Tried, max_drop: float) -> float:
        """Of "this setting loses `max_drop` or more", which `tried` made."""

    @property
    def dense_accuracy(self) -> float | None:
        """Of the dense model, where something is right or wrong."""
        return None


class Accuracy(Loss):
    """Answers that are right dense and wrong pruned, less those the other way round; exact, see `experiments.drop`."""

    needed = staticmethod(prompts_needed)

    def __init__(self, setup: Setup, confidence: float, ledger: Ledger, progress: Progress | None) -> None:
        super().__init__(setup, confidence, ledger, progress)
        check_answers(setup)

    @cached_property
    def dense(self) -> Evaluation:
        return self._answered(None, "dense")

    @property
    def dense_accuracy(self) -> float | None:
        return self.dense.accuracy

    def tried(self, pruner: Pruner, target: float) -> Tried:
        dense, pruned = self.dense, self._answered(pruner, f"keep ratio {target:g}")
        pairs = [(a.correct, b.correct) for a, b in zip(dense.answers, pruned.answers, strict=True)]
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        return Tried(
            target=target,
            threshold=pruner.gate.threshold,
            keep_ratio=1 - pruned.sparsity,
            keep_ratio_per_token=1 - pruned.sparsity_per_token,
            accuracy=pruned.accuracy,
            lost=lost,
            won=won,
            drop=(lost - won) / len(pairs),
            drop_bound=drop_limit(lost, won, len(pairs), self.confidence),
        )

    def p_value(self, tried: Tried, max_drop: float) -> float:
        assert tried.lost is not None
        assert tried.won is not None
        return drop_p_value(tried.lost, tried.won, len(self.setup.examples), max_drop, self.confidence)

    def _answered(self, pruner: Pruner | None, label: str) -> Evaluation:
        key = {"threshold": None if pruner is None else pruner.gate.threshold}
        work = partial(answers, self.setup, pruner, label, self.progress)
        return Evaluation.from_json(self.ledger.get(key, work))


class Bounded(Loss):
    """A loss between 0 and 1 of each prompt's text; its mean is tested by betting, see `experiments.bounded`."""

    needed = staticmethod(losses_needed)

    def __init__(self, setup: Setup, confidence: float, ledger: Ledger, progress: Progress | None) -> None:
        super().__init__(setup, confidence, ledger, progress)
        self._losses = dict[float, list[float]]()  # by threshold

    @abstractmethod
    def of(self, one: Closeness) -> float:
        """The loss of one prompt; 0 where its text has no token that pruned units predict."""

    @cached_property
    def texts(self) -> list[Pair]:
        return texts_of(self.setup, self.ledger, self.progress)

    def tried(self, pruner: Pruner, target: float) -> Tried:
        label, progress = f"keep ratio {target:g}", self.progress
        close = closeness(
            self.setup.model,
            self.texts,
            pruner,
            execution=self.setup.execution,
            batch_size=self.setup.batch_size,
            progress=partial(progress, label) if progress else None,
            ledger=self.ledger,
        )
        losses = [self.of(one) for one in close]
        self._losses[pruner.gate.threshold] = losses
        return Tried(
            target=target,
            threshold=pruner.gate.threshold,
            keep_ratio=sum(one.keep_ratio for one in close) / len(close),
            drop=sum(losses) / len(losses),
            drop_bound=mean_limit(losses, self.confidence),
        )

    def p_value(self, tried: Tried, max_drop: float) -> float:
        return mean_p_value(self._losses[tried.threshold], max_drop, self.confidence)


class Agreement(Bounded):
    """The share of a text's tokens for which the pruned model has another favourite than the dense one."""

    def of(self, one: Closeness) -> float:
        return one.disagreement


class Kl(Bounded):
    """A text's mean KL(dense ‖ pruned) per token, in nats, MOST_KL at most."""

    def of(self, one: Closeness) -> float:
        return min(MOST_KL, max(0.0, one.mean_kl))


LOSSES: dict[str, type[Loss]] = {"accuracy": Accuracy, "agreement": Agreement, "kl": Kl}
