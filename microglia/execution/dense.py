"""Dense: nothing is pruned. Under `attached` prompts are still measured and decided about."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from transformers.cache_utils import Cache

from microglia.execution.base import EXECUTIONS, Decision, Execution
from microglia.units import Site


@EXECUTIONS.register("dense")
class Dense(Execution):
    """Every unit stays."""

    name: ClassVar[str] = "dense"
    prunes: ClassVar[bool] = False
    saves: ClassVar[bool] = False

    @contextmanager
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None) -> Iterator[None]:
        yield
