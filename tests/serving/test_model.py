"""One batch of the model: each row says what it says alone, whatever its neighbours want."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from microglia.errors import ConfigError
from microglia.execution import EXECUTIONS
from microglia.generation import generate
from microglia.serving.job import Finished, Job, Piece, Pruning, Sampling
from microglia.serving.sampling import draw_token
from tests.serving.served import alone, tiny_pruned

PRUNING = [name for name, kind in EXECUTIONS.items() if kind.prunes]
PROMPTS = ["what is 3+4?", "7*8-2=", "a", "Question: How many?\nAnswer:"]


@pytest.fixture(scope="module", params=PRUNING)
def model(request):
    return tiny_pruned(request.param)


@pytest.fixture
def library(model):
    """What the library says to one prompt with the same execution."""
    return partial(alone, execution=model.execution)


def written(model, *jobs):
    """Jobs (prompt, sampling) as one batch, pruned as trained → text and end of each."""
    events = [[] for _ in jobs]
    batch = [
        Job(prompt, len(prompt), model.pruning(True, None), sampling, into.append)
        for (prompt, sampling), into in zip(jobs, events, strict=True)
    ]
    model.answer(batch)
    assert all(isinstance(into[-1], Finished) for into in events)
    assert all(isinstance(event, Piece) for into in events for event in into[:-1])
    return [("".join(piece.text for piece in into[:-1]), into[-1]) for into in events]


def test_rows_of_different_lengths_say_what_they_say_alone(model, library):
    found = written(model, *((prompt, Sampling(6 + 5 * row)) for row, prompt in enumerate(PROMPTS)))
    for row, (text, end) in enumerate(found):
        truth = library(PROMPTS[row], 6 + 5 * row)
        assert text == truth.texts[0]
        assert end.completion_tokens == truth.lengths[0]
        assert end.heads_kept == sum(int(keep.sum()) for keep in truth.keep)
        assert end.heads == 16
        assert end.reason == ("length" if end.completion_tokens == 6 + 5 * row else "stop")
    assert len({text for text, _ in found}) == len(PROMPTS)
    assert len({end.heads_kept for _, end in found}) > 1


def test_a_seed_says_the_same_in_any_company(model, library):
    hot = Sampling(12, temperature=1.5, top_p=0.9, seed=7)
    first = written(model, (PROMPTS[0], hot))[0][0]
    company = written(model, (PROMPTS[1], Sampling(20, temperature=2.0)), (PROMPTS[0], hot), (PROMPTS[2], Sampling(3)))
    assert company[1][0] == first
    assert company[2][0] == library(PROMPTS[2], 3).texts[0]
    other = Sampling(12, temperature=1.5, top_p=0.9, seed=8)
    assert written(model, (PROMPTS[0], other))[0][0] != first != library(PROMPTS[0], 12).texts[0]


def test_no_nucleus_and_no_heat_are_greedy(model, library):
    greedy = library(PROMPTS[0], 10).texts[0]
    for sampling in (Sampling(10, temperature=1.0, top_p=0.0), Sampling(10, temperature=1e-9)):
        assert written(model, (PROMPTS[0], sampling))[0][0] == greedy


def test_the_draw_follows_the_distribution():
    scores, generator = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.Generator().manual_seed(0)
    draws = torch.tensor([draw_token(scores, Sampling(1, temperature=2.0), generator) for _ in range(4000)])
    found = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(found, (scores[0] / 2).softmax(-1), rtol=0, atol=0.03)
    nucleus = {draw_token(scores, Sampling(1, temperature=2.0, top_p=0.5), generator) for _ in range(100)}
    assert nucleus == {2, 3}


def test_a_stop_text_ends_the_answer_before_it(model, library):
    whole = library(PROMPTS[0], 20).texts[0]
    stop = whole[5:8]
    (text, end), (neighbour, _) = written(
        model, (PROMPTS[0], Sampling(20, stop=("never\x00", stop))), (PROMPTS[1], Sampling(20))
    )
    assert text == whole[: whole.index(stop)]
    assert end.reason == "stop"
    assert end.completion_tokens < 20
    assert neighbour == library(PROMPTS[1], 20).texts[0]


def test_pruned_heads_leave_behind_what_the_library_leaves(model, library):
    filled = replace(model, pruner=replace(model.pruner, fill="mean"))
    truth = generate(
        filled.model, filled.tokenizer, PROMPTS[:1], filled.pruner, execution=filled.executor, max_new_tokens=20
    )
    assert written(filled, (PROMPTS[0], Sampling(20)))[0][0] == truth.texts[0] != library(PROMPTS[0], 20).texts[0]


def test_dense_jobs_keep_every_head(model, library):
    events = []
    model.answer([Job(PROMPTS[0], 12, Pruning(None), Sampling(15), events.append)])
    text = "".join(event.text for event in events[:-1])
    assert text == library(PROMPTS[0], 15, pruning=False).texts[0] != library(PROMPTS[0], 15).texts[0]
    assert (events[-1].heads_kept, events[-1].heads) == (16, 16)


def test_the_heads_that_will_be_kept_are_counted(model, library):
    jobs = [Job(prompt, 9, model.pruning(True, 0.7), Sampling(3), lambda event: None) for prompt in PROMPTS]
    model.count_kept_heads(jobs)
    for job in jobs:
        keep = library(job.prompt, 1, keep_ratio=0.7).keep
        assert job.kept_heads == tuple(int(k.sum()) for k in keep)
    assert len({job.kept_heads for job in jobs}) > 1


def test_a_cancelled_row_ends_and_its_neighbour_does_not(model, library):
    events = []
    left = Job(PROMPTS[0], 12, model.pruning(True, None), Sampling(300), lambda event: setattr(left, "cancelled", True))
    stays = Job(PROMPTS[1], 6, model.pruning(True, None), Sampling(10), events.append)
    steps = []
    hook = model.lm.register_forward_pre_hook(lambda *_: steps.append(1))
    model.answer([left, stays])
    hook.remove()
    assert len(steps) <= 12  # not 300
    assert "".join(event.text for event in events[:-1]) == library(PROMPTS[1], 10).texts[0]


def test_a_keep_ratio_needs_prompts_to_calibrate_on(model):
    loose, tight = model.pruning(True, 0.9).threshold, model.pruning(True, 0.5).threshold
    assert loose < tight
    bare = replace(model, pruner=replace(model.pruner, budget=None))
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 was given, but there are no prompts to calibrate it on"):
        bare.pruning(True, 0.5)
    assert bare.pruning(False, 0.5) == Pruning(None)
