"""The queue and its batches, with a model that only notes what it gets."""

import threading

import pytest

from microglia.errors import ConfigError, DataError
from microglia.serving.config import ServingConfig
from microglia.serving.job import Failed, Finished, Job, Pruning, Sampling
from microglia.serving.worker import (
    BROKE,
    STOPPED,
    Full,
    Stopped,
    Worker,
    equal_pruning,
    fit_into_context,
    order_by_decision,
)


def job(name="x", threshold=0.0, tokens=5, longest=5):
    events = []
    made = Job(name, tokens, Pruning(threshold), Sampling(longest), events.append)
    made.events = events
    return made


class Noting:
    """Answers at once, after `go`; fails on batches that hold a prompt named bad."""

    context_length = 100

    def __init__(self):
        self.batches, self.counted, self.forgotten = [], [], set()
        self.go, self.busy = threading.Event(), threading.Event()

    def answer(self, jobs):
        self.busy.set()
        assert self.go.wait(30)
        self.batches.append([j.prompt for j in jobs])
        for one in jobs:
            if one.prompt == "bad":
                raise RuntimeError("secret")
            if one.prompt == "refused":
                raise DataError("a sentence")
        for one in jobs:
            if one.prompt not in self.forgotten:
                one.end(Finished("stop", 1, 1, 2, 0.0, 0.0))

    def count_kept_heads(self, jobs):
        self.counted.append([j.prompt for j in jobs])
        for one in jobs:
            one.kept_heads, one.mask = (len(one.prompt), 4), one.prompt.encode()


@pytest.fixture
def start():
    """A function that starts a worker, busy with a first job, so that what comes next has to wait."""
    workers = []

    def make(**options):
        model = Noting()
        worker = Worker(model, ServingConfig("x", **options), gather=0)
        worker.start()
        workers.append(worker)
        worker.submit([job("first")])
        assert model.busy.wait(30)
        return worker, model

    yield make
    for worker in workers:
        worker.model.go.set()
        worker.stop()


def drained(worker):
    worker.model.go.set()
    with worker.changed:
        pass
    while worker.waiting or worker.running:
        threading.Event().wait(0.01)


def test_what_is_pruned_alike_shares_a_batch_and_the_oldest_goes_first(start):
    worker, model = start(max_batch=3)
    worker.submit([job("a", 0.0), job("b", 0.5), job("c", 0.0), job("d", None), job("e", 0.0), job("f", 0.0)])
    drained(worker)
    assert model.batches == [["first"], ["a", "c", "e"], ["b"], ["d"], ["f"]]


def test_by_decision_those_that_keep_as_many_heads_share_a_batch(start):
    worker, model = start(max_batch=2, batch_by="decision")
    worker.submit([job("aaaa"), job("b"), job("cc"), job("dddd"), job("e")])
    drained(worker)
    assert model.batches == [["first"], ["aaaa", "dddd"], ["b", "e"], ["cc"]]
    assert sorted(name for names in model.counted for name in names) == [
        "aaaa",
        "b",
        "cc",
        "dddd",
        "e",
    ]  # each is counted once


def test_by_mask_only_those_that_keep_the_same_heads_share_a_batch(start):
    worker, model = start(max_batch=3, batch_by="mask")
    worker.submit([job("aaaa"), job("b"), job("bbbb"), job("aaaa"), job("b"), job("aaaa"), job("aaaa")])
    drained(worker)
    assert model.batches == [["first"], ["aaaa", "aaaa", "aaaa"], ["b", "b"], ["bbbb"], ["aaaa"]]
    assert len(model.counted) == 3  # all waiting prompts at first, three at a time, and never again


def test_by_decision_dense_and_few_prompts_are_not_counted(start):
    worker, model = start(max_batch=2, batch_by="decision")
    worker.submit([job("a"), job("b"), job("c", None), job("d", None), job("e", None)])
    drained(worker)
    assert model.counted == []


def test_a_full_queue_takes_all_of_a_request_or_none(start):
    worker, _ = start(max_waiting=3)
    worker.submit([job(), job()])
    with pytest.raises(Full, match="2 prompts are waiting and 2 more would be too many for the queue of 3"):
        worker.submit([job(), job()])
    worker.submit([job()])
    assert len(worker.waiting) == 3


def test_a_cancelled_job_frees_its_place_and_is_never_answered(start):
    worker, model = start(max_waiting=1)
    left = job("left")
    worker.submit([left])
    left.cancelled = True
    worker.submit([job("stays")])
    drained(worker)
    assert model.batches == [["first"], ["stays"]]
    assert left.events == []


def test_one_bad_prompt_takes_no_other_with_it(start):
    worker, model = start()
    jobs = [job(name) for name in ("good", "bad", "refused", "fine")]
    worker.submit(jobs)
    drained(worker)
    assert [type(j.events[-1]) for j in jobs] == [Finished, Failed, Failed, Finished]
    assert [len(j.events) for j in jobs] == [1, 1, 1, 1]
    assert jobs[1].events == [Failed(BROKE)]  # what a stranger's error says is for the log
    assert jobs[2].events == [Failed("a sentence")]
    assert model.batches[2:] == [["good"], ["bad"], ["refused"], ["fine"]]
    assert worker.alive


def test_a_job_that_the_model_did_not_end_has_failed(start):
    """Whatever stopped its generation: else its client would wait for ever."""
    worker, model = start()
    jobs = [job(name) for name in ("ends", "forgotten", "left", "ends too")]
    model.forgotten = {"forgotten", "left"}
    jobs[2].cancelled = True
    worker.submit(jobs[:2])
    worker.submit(jobs[2:])
    drained(worker)
    assert [type(j.events[-1]) for j in (jobs[0], jobs[3])] == [Finished, Finished]
    assert jobs[1].events == [Failed(BROKE)]
    assert jobs[1].ended
    assert worker.alive
    worker.submit([after := job("after")])
    drained(worker)
    assert isinstance(after.events[-1], Finished)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_should_the_thread_die_nobody_waits_for_it(start):
    def die(jobs):
        raise RuntimeError("out of luck")

    worker, model = start(max_batch=1)
    running, waiting = job("running"), job("waiting")
    worker.submit([running, waiting])
    worker.on_batch = die
    model.go.set()
    worker.thread.join(30)
    assert not worker.alive
    assert running.events == [Failed(BROKE)]
    assert waiting.events == [Failed(STOPPED, 503)]
    assert (worker.running, worker.waiting) == ([], [])


def test_stopping_waits_as_long_as_it_is_told(start):
    worker, model = start()
    worker.stop(0.05)
    assert worker.thread.is_alive()
    model.go.set()
    worker.stop()
    assert not worker.thread.is_alive()


def test_stopping_finishes_the_batch_and_tells_those_who_wait(start):
    worker, model = start()
    waiting = job("waiting")
    worker.submit([waiting])
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    while not waiting.events:
        threading.Event().wait(0.01)
    assert waiting.events == [Failed(STOPPED, 503)]
    assert worker.thread.is_alive()  # the first job is still being answered
    model.go.set()
    stopping.join(30)
    assert model.batches == [["first"]]
    assert not worker.thread.is_alive()
    with pytest.raises(Stopped, match="shutting down"):
        worker.submit([job()])


def test_a_batch_fits_into_the_context_side_by_side():
    jobs = [job("a", tokens=50, longest=10), job("b", tokens=10, longest=60), job("c", tokens=40, longest=50)]
    assert [j.prompt for j in fit_into_context(jobs, 3, context_length=100)] == ["a", "c"]
    assert [j.prompt for j in fit_into_context(jobs, 3, context_length=None)] == ["a", "b", "c"]
    assert [j.prompt for j in fit_into_context(jobs, 1, context_length=None)] == ["a"]


def test_the_oldest_comes_first_whatever_it_is_ordered_by():
    jobs = [job("old", 0.5), job("other", 0.1), job("new", 0.5)]
    assert equal_pruning(jobs) == [jobs[0], jobs[2]]
    assert equal_pruning([]) == []
    for one, counts in zip(jobs, [(4, 4), (1, 7), (4, 5)], strict=True):
        one.kept_heads = counts
    assert order_by_decision(jobs) == [jobs[0], jobs[2], jobs[1]]


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_waiting": 0}, {"batch_by": "luck"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"was given; it must be at least 1|choose one of settings, decision, mask"):
        Worker(Noting(), ServingConfig("x", **wrong))
