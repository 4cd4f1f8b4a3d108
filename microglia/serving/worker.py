"""The bounded queue before the model, the batches that are formed from it, and the one thread that owns the model."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from microglia.errors import ConfigError, MicrogliaError
from microglia.serving.job import Failed, Job

log = logging.getLogger(__name__)
BATCH_BY = ("settings", "decision")
STOPPED = "the server is shutting down; ask again when it is back"
BROKE = "the model failed on this prompt; ask again, and if it happens twice look into the server's log"


class Model(Protocol):
    """What the thread needs of a model: `model.PrunedModel`."""

    @property
    def room(self) -> int | None: ...

    def answer(self, jobs: Sequence[Job]) -> None: ...

    def look_at(self, jobs: Sequence[Job]) -> None: ...


class Full(MicrogliaError):
    """The queue has no place left."""


class Stopped(MicrogliaError):
    """The server takes no more work."""


class Worker:
    """`submit` puts jobs into the queue; a thread of its own takes them out in batches and lets the model answer.

    max_batch: rows of a batch; max_waiting: jobs in the queue, those being answered not counted; gather: seconds that
    an idle model waits for company when a job arrives; batch_by: `settings` takes the oldest jobs that are pruned
    alike, `decision` looks at all of those first, when there are more than fit, and takes the ones that keep about as
    many heads as the oldest; on_batch: told the jobs of every batch.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 16,
        max_waiting: int = 64,
        gather: float = 0.01,
        batch_by: str = "settings",
        on_batch: Callable[[Sequence[Job]], None] = lambda jobs: None,
    ) -> None:
        if batch_by not in BATCH_BY:
            raise ConfigError(f"batch_by={batch_by!r} is unknown; choose {' or '.join(BATCH_BY)}")
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise ConfigError(f"{name}={value} was given; it must be at least 1")
        self.model, self.max_batch, self.max_waiting, self.gather = model, max_batch, max_waiting, gather
        self.batch_by, self.on_batch = batch_by, on_batch
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
            if len(self.waiting) + len(jobs) > self.max_waiting:
                raise Full(
                    f"{len(self.waiting)} prompts are waiting and {len(jobs)} more would be too many for the queue of "
                    f"{self.max_waiting}; ask again in a moment"
                )
            self.waiting += jobs
            self.changed.notify()

    def stop(self) -> None:
        """Finish the batch that is being written, tell the waiting jobs that nobody will answer, end the thread."""
        self._dismiss()
        if self.thread.ident is not None:
            self.thread.join()

    def _dismiss(self) -> None:
        with self.changed:
            self.stopping = True
            left, self.waiting = self.waiting, []
            self.changed.notify()
        for job in left:
            job.end(Failed(STOPPED))

    def _run(self) -> None:
        try:
            while batch := self._next():
                self.on_batch(batch)
                self._answer(batch)
                with self.changed:
                    self.running = []
        finally:  # should the thread ever die of itself, nobody must wait for it
            self._dismiss()

    def _next(self) -> list[Job]:
        """The next batch, waiting for one; empty when it is time to stop."""
        while True:
            alike = self._alike()
            if self.batch_by == "decision" and len(alike) > self.max_batch and alike[0].pruning.threshold is not None:
                alike = self._by_decision(alike)
            with self.changed:
                if self.stopping:
                    return []
                self.running = fitting(alike, self.max_batch, self.model.room)
                taken = {id(job) for job in self.running}
                self.waiting = [job for job in self.waiting if id(job) not in taken]
                if self.running:
                    return self.running

    def _alike(self) -> list[Job]:
        """Wait for jobs; those that may share a batch with the oldest."""
        with self.changed:
            if not self.waiting:
                self.changed.wait_for(lambda: self.waiting or self.stopping)
                self.changed.wait_for(lambda: self.stopping or len(self.waiting) >= self.max_batch, self.gather)
            self._drop_cancelled()
            return pruned_alike(self.waiting)

    def _by_decision(self, jobs: list[Job]) -> list[Job]:
        """The oldest job first, then those whose prompts keep about as many heads at every site."""
        try:
            for group in _parts([job for job in jobs if job.counts is None], self.max_batch):
                self.model.look_at(group)
        except Exception:  # whoever is to blame hears of it alone, when it is answered
            log.exception("could not look at the waiting prompts; batches are formed by age")
            return jobs
        return by_decision(jobs)

    def _answer(self, jobs: list[Job]) -> None:
        """Let the model answer; when it fails on a batch, each job that has not begun is tried alone."""
        try:
            self.model.answer(jobs)
            return
        except Exception as error:  # one prompt must not take the thread, hence everybody's answers, with it
            log.exception("a batch of %d failed", len(jobs))
            failed = Failed(str(error) if isinstance(error, MicrogliaError) else BROKE)
        # Not inside `except`, where the error would keep the batch's tensors in memory.
        again = [job for job in jobs if len(jobs) > 1 and not (job.ended or job.told or job.cancelled)]
        for job in jobs:
            if job not in again:
                job.end(failed)
        for job in again:
            self._answer([job])

    def _drop_cancelled(self) -> None:
        self.waiting = [job for job in self.waiting if not job.cancelled]


def pruned_alike(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that may share a batch with the oldest, which comes first."""
    return [job for job in jobs if job.pruning == jobs[0].pruning]


def by_decision(jobs: Sequence[Job]) -> list[Job]:
    """The oldest job, then the others by how many heads they keep more or less than it, summed over sites."""
    oldest = jobs[0].counts or ()
    return sorted(jobs, key=lambda job: sum(abs(a - b) for a, b in zip(job.counts or (), oldest, strict=True)))


def fitting(jobs: Sequence[Job], most: int, room: int | None) -> list[Job]:
    """The first `most` jobs whose longest prompt and longest answer fit into the model's context side by side."""
    batch: list[Job] = []
    prompt = answer = 0
    for job in jobs:
        longest_prompt, longest_answer = max(prompt, job.prompt_tokens), max(answer, job.sampling.max_new_tokens)
        if len(batch) < most and (not batch or room is None or longest_prompt + longest_answer <= room):
            batch.append(job)
            prompt, answer = longest_prompt, longest_answer
    return batch


def _parts(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]
