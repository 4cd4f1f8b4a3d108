"""What a benchmark found: one row per variant, as JSON and as records."""

from dataclasses import asdict, dataclass, field
from typing import Any

from microglia.record import Record


@dataclass(frozen=True)
class Row:
    """One variant at one batch size, context and keep ratio. Times are medians in ms, of a step of the whole batch.

    ratio_to_dense: median of paired dense time ÷ this time, with its 95 % interval; above 1 is faster.
    ceiling: the ratio's best possible value. kv_bytes: held after the prompt. peak_bytes: most memory of a request.
    bytes_per_token, step_flops: read and computed by one decode step. request_ratio: dense request ÷ this request.
    """

    variant: str
    batch_size: int
    context: int
    keep_ratio: float
    ms_per_token: float
    ratio_to_dense: float
    ceiling: float
    realised_share: float | None
    kv_bytes: int
    peak_bytes: int | None
    break_even_tokens: int | None
    p20: float
    p80: float
    n: int
    ratio_ci95: tuple[float, float]
    sparsity: float
    decides: str
    weight_bytes: int
    bytes_per_token: int
    prefill_flops: int
    step_flops: int
    first_token_ms: float
    request_ms: float
    request_ratio: float
    new_tokens: int
    decision_ms: float | None = None
    slicing_ms: float | None = None
    monitoring_ratio: float | None = None


@dataclass(frozen=True)
class Report:
    """All rows with their circumstances: device, versions, commit, command; `subject` says what was measured."""

    rows: list[Row]
    subject: dict[str, Any]
    circumstances: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"rows": [asdict(row) for row in self.rows], **self.circumstances, "subject": self.subject}

    def records(self) -> list[Record]:
        """One record a row: the time of a decode step, with everything else of the row as extra."""
        return [
            Record(
                name="decode_latency",
                value=row.ms_per_token,
                unit="ms",
                p20=row.p20,
                p80=row.p80,
                n=row.n,
                seed=self.subject.get("seed"),
                extra={**self.subject, **asdict(row)},
                **self.circumstances,
            )
            for row in self.rows
        ]
