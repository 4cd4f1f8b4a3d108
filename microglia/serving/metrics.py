"""What `/metrics` shows, in Prometheus' text format."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from microglia.serving.job import Finished, Job

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
SHARES = tuple(i / 20 for i in range(1, 21))


class Metrics:
    """Counters of one server; `waiting` and `running` are called whenever the metrics are read."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("microglia_requests", "Requests by path and status", ["path", "status"], registry=r)
        self.answers = Counter("microglia_answers", "Answers by how they ended", ["reason"], registry=r)
        self.prompt_tokens = Counter("microglia_prompt_tokens", "Tokens read", registry=r)
        self.completion_tokens = Counter("microglia_completion_tokens", "Tokens written", registry=r)
        self.sparsity = Histogram("microglia_sparsity", "Share of pruned heads by prompt", buckets=SHARES, registry=r)
        self.queued = Histogram("microglia_queued_seconds", "Arrival to reading", buckets=SECONDS, registry=r)
        self.seconds = Histogram("microglia_answer_seconds", "Reading to last token", buckets=SECONDS, registry=r)
        self.rows = Histogram("microglia_batch_rows", "Prompts by batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r)
        for name, text, count in (("waiting", "in the queue", waiting), ("running", "being answered", running)):
            Gauge(f"microglia_{name}", f"Prompts {text}", registry=r).set_function(count)

    def batch(self, jobs: Sequence[Job]) -> None:
        self.rows.observe(len(jobs))

    def finished(self, job: Job, event: Finished) -> None:
        self.answers.labels(event.reason).inc()
        self.prompt_tokens.inc(job.prompt_tokens)
        self.completion_tokens.inc(event.completion_tokens)
        self.sparsity.observe(1 - event.heads_kept / event.heads)
        self.queued.observe(event.queued_seconds)
        self.seconds.observe(event.seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
