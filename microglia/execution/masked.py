"""Masked: pruned units are computed and multiplied by zero. Saves nothing; the reference for all that does."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from torch import Tensor
from transformers.cache_utils import Cache

from microglia.execution.base import EXECUTIONS, Decision, Execution
from microglia.units import Site


@EXECUTIONS.register("masked")
class Masked(Execution):
    """keep may be soft. where: (B, T) limits the gates to these positions, for passes over more than the answer."""

    name: ClassVar[str] = "masked"
    saves: ClassVar[bool] = False

    def __init__(self, where: Tensor | None = None) -> None:
        self.where = where

    @contextmanager
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            for site, keep in zip(sites, decision.keep, strict=True):
                stack.enter_context(site.gated(keep, where=self.where, fill=decision.fill_of(site)))
            yield
