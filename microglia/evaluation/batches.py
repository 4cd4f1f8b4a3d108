"""Long work on many examples, batch by batch: shared out among processes, and not done twice when it is interrupted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from microglia import processes
from microglia.ledger import Ledger

Progress = Callable[[int, int], None]  # called with what is done and how much there is


def by_batches(
    batches: Sequence[list[int]],
    work: Callable[[list[int]], dict[str, Any]],
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """What `work` makes of each batch of row numbers, in order; its values are JSON, as a ledger keeps them.

    ledger: already within everything that the values depend on beside the rows. `progress(done, total)` counts rows.
    """
    total, done = sum(map(len, batches)), 0
    kept = ledger or Ledger()

    def one(rows: list[int]) -> dict[str, Any]:
        nonlocal done
        value: dict[str, Any] = kept.get({"rows": rows}, partial(work, rows))
        done += len(rows) * processes.count()
        if progress:
            progress(min(done, total), total)
        return value

    processes.join()
    return processes.shared_out(batches, one)
