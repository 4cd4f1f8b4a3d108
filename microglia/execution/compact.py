"""Compact: pruned units are really gone from the weights, or from each row's own key/value cache."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from transformers.cache_utils import Cache

from microglia.execution.base import EXECUTIONS, Decision, Execution, check_hard
from microglia.gate import rows_agree
from microglia.units import Site, gone


@EXECUTIONS.register("compact")
class Compact(Execution):
    """Rows that agree at a site share cut weights there; else every row keeps its own units of what some row keeps."""

    name: ClassVar[str] = "compact"

    @contextmanager
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None = None) -> Iterator[None]:
        """Leaving restores the model bit for bit. Raises MicrogliaError for keeps other than 0 and 1."""
        with ExitStack() as stack:
            for site, keep in zip(sites, decision.keep, strict=True):
                check_hard(site, keep, "compaction")
                if bool((keep > 0).all()) or gone(site, keep):
                    continue  # nothing is pruned here, or everything with its sublayer
                fill = decision.fill_of(site)
                if fill is not None:
                    site.filled(stack, keep, fill)
                if rows_agree([keep]):
                    site.cut(stack, keep[0] > 0, cache)
                else:
                    site.cut_rows(stack, keep > 0, cache)
            yield
