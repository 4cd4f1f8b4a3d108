"""The bounded queue before the model, the batches that are formed from it, and the one thread that owns the model."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from microglia.errors import MicrogliaError
from microglia.serving.config import ServingConfig
from microglia.serving.job import Failed, Job

log = logging.getLogger(__name__)
STOPPED = "the server is shutting down; ask again when it is back"
BROKE = "the model failed on this prompt; ask again, and if it happens twice look into the server's log"


class Model(Protocol):
    """What the thread needs of a model: `model.PrunedModel`."""

    @property
    def context_length(self) -> int | None: ...

    def answer(self, jobs: Sequence[Job]) -> None: ...

    def count_kept_heads(self, jobs: Sequence[Job]) -> None: ...


class Full(MicrogliaError):
    """The queue has no place left."""


class Stopped(MicrogliaError):
    """The server takes no more work."""


class Worker:
    """`submit` puts jobs into the queue; a thread of its own takes them out in batches and lets the model answer.

    gather: seconds that an idle model waits for company when a job arrives; on_batch: called with every batch's jobs.
    """

    def __init__(
        self,
        model: Model,
        config: ServingConfig,
        *,
        gather: float = 0.01,
        on_batch: Callable[[Sequence[Job]], None] = lambda jobs: None,
    ) -> None:
        self.model, self.config, self.gather, self.on_batch = model, config, gather, on_batch
        self.waiting: list[Job] = []  # oldest first
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="microglia-model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether jobs are still answered."""
        return self.thread.is_alive() and not self.stopping

    def start(self) -> None:
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none. Raises Full, or Stopped when the thread takes no more."""
        with self.changed:
            if not self.alive:
                raise Stopped(STOPPED)
            self._drop_cancelled()
            if len(self.waiting) + len(jobs) > self.config.max_waiting:
                raise Full(
                    f"{len(self.waiting)} prompts are waiting and {len(jobs)} more would be too many for the queue of "
                    f"{self.config.max_waiting}; ask again in a moment"
                )
            self.waiting += jobs
            self.changed.notify()

    def stop(self, seconds: float | None = None) -> None:
        """Finish the batch that is being written, tell the waiting jobs that nobody will answer, end the thread.

        seconds: to wait for the thread, None for as long as the batch needs.
        """
        self._dismiss()
        if self.thread.ident is not None:
            self.thread.join(seconds)

    def _dismiss(self) -> None:
        with self.changed:
            self.stopping = True
            left, self.waiting = self.waiting, []
            self.changed.notify()
        for job in left:
            job.end(Failed(STOPPED, 503))

    def _run(self) -> None:
        try:
            while batch := self._next():
                self.on_batch(batch)
                self._answer(batch)
                with self.changed:
                    self.running = []
        finally:  # should the thread ever die of itself, nobody must wait for it
            self._dismiss()
            for job in self.running:
                job.end(Failed(BROKE))
            self.running = []

    def _next(self) -> list[Job]:
        """The next batch, waiting for one; empty when it is time to stop."""
        while True:
            jobs = self._jobs_of_equal_pruning()
            if self.config.batch_by == "decision" and len(jobs) > self.config.max_batch and self._counted(jobs):
                jobs = order_by_decision(jobs)
            elif self.config.batch_by == "mask" and len(jobs) > 1 and self._counted(jobs):
                jobs = [job for job in jobs if job.mask == jobs[0].mask]
            with self.changed:
                if self.stopping:
                    return []
                self.running = fit_into_context(jobs, self.config.max_batch, self.model.context_length)
                self.waiting = [job for job in self.waiting if job not in self.running]
                if self.running:
                    return self.running

    def _jobs_of_equal_pruning(self) -> list[Job]:
        """Wait for jobs; those that may share a batch with the oldest."""
        with self.changed:
            if not self.waiting:
                self.changed.wait_for(lambda: self.waiting or self.stopping)
                self.changed.wait_for(lambda: self.stopping or len(self.waiting) >= self.config.max_batch, self.gather)
            self._drop_cancelled()
            return equal_pruning(self.waiting)

    def _counted(self, jobs: list[Job]) -> bool:
        """Whether it is known which heads the jobs' prompts will keep: those that were not read ahead are now."""
        if jobs[0].pruning.threshold is None:
            return False
        uncounted, size = [job for job in jobs if job.kept_heads is None], self.config.max_batch
        try:
            for start in range(0, len(uncounted), size):
                self.model.count_kept_heads(uncounted[start : start + size])
        except Exception:  # whoever is to blame hears of it alone, when it is answered
            log.exception("could not read the waiting prompts ahead; batches are formed by age")
            return False
        return True

    def _answer(self, jobs: list[Job]) -> None:
        """Let the model answer; when it fails on a batch, each job that has not begun is tried alone."""
        try:
            self.model.answer(jobs)
            for job in jobs:
                if not job.ended:  # its generation stopped for a reason that no row knows of
                    job.end(Failed(BROKE))
            return
        except Exception as error:  # one prompt must not take the thread, hence everybody's answers, with it
            log.exception("a batch of %d failed", len(jobs))
            failed = Failed(str(error) if isinstance(error, MicrogliaError) else BROKE)
        # Not inside `except`, where the error would keep the batch's tensors in memory.
        again = [job for job in jobs if len(jobs) > 1 and not (job.ended or job.has_output or job.cancelled)]
        for job in jobs:
            if job not in again:
                job.end(failed)
        for job in again:
            self._answer([job])

    def _drop_cancelled(self) -> None:
        self.waiting = [job for job in self.waiting if not job.cancelled]


def equal_pruning(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that may share a batch with the oldest, which comes first."""
    return [job for job in jobs if job.pruning == jobs[0].pruning]


def order_by_decision(jobs: Sequence[Job]) -> list[Job]:
    """The oldest job, then the others by how many heads they keep more or less than it, summed over sites."""
    oldest = jobs[0].kept_heads or ()
    return sorted(jobs, key=lambda job: sum(abs(a - b) for a, b in zip(job.kept_heads or (), oldest, strict=True)))


def fit_into_context(jobs: Sequence[Job], most: int, context_length: int | None) -> list[Job]:
    """The first `most` jobs whose longest prompt and longest answer fit into the model's context side by side."""
    batch: list[Job] = []
    prompt = answer = 0
    for job in jobs:
        longest_prompt, longest_answer = max(prompt, job.prompt_tokens), max(answer, job.sampling.max_new_tokens)
        fits = context_length is None or longest_prompt + longest_answer <= context_length
        if len(batch) < most and (fits or not batch):
            batch.append(job)
            prompt, answer = longest_prompt, longest_answer
    return batch
