"""The rows of a benchmark as records."""

from dataclasses import asdict

from microglia.record import Record
from microglia.results import BenchmarkResult


def records(result: BenchmarkResult) -> list[Record]:
    """One record a row: the time of a decode step, with everything else of the row as extra."""
    return [
        Record(
            name="decode_latency",
            value=row.ms_per_token,
            unit="ms",
            p20=row.p20,
            p80=row.p80,
            n=row.n,
            seed=result.subject.get("seed"),
            extra={**result.subject, **asdict(row)},
            **asdict(result.circumstances),
        )
        for row in result.rows
    ]
