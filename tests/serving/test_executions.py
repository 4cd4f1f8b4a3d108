"""The server with any execution: it says what the library says with the same one, and counts kept heads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from microglia.errors import ConfigError
from microglia.execution import EXECUTIONS
from tests.serving.served import NAME, alone, running, tiny_pruned

PROMPTS = ["1 + 1 =", "what is 3+4?", "Question: How many?\nAnswer:", "a"]


@pytest.fixture(scope="module", params=list(EXECUTIONS))
def served(request):
    with running(tiny_pruned(request.param)) as server:
        yield server


@pytest.fixture
def library(served):
    """What the library says to one prompt with the same execution."""
    return partial(alone, execution=served.model.execution)


def kept_heads(answer):
    """Heads that the library keeps; every one where it prunes nothing."""
    return sum(int(keep.sum()) for keep in answer.keep) if answer.keep else 16


class Draws(LogitsProcessor):
    """Draws one row's tokens at a temperature with its own seed; greedy then takes what was drawn."""

    def __init__(self, temperature, seed):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        token = torch.multinomial((scores / self.temperature).softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def test_a_batch_is_answered_with_its_usage(served, library):
    answer = served.client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=14)
    truths = [library(prompt, 14) for prompt in PROMPTS]
    assert [choice.text for choice in answer.choices] == [truth.texts[0] for truth in truths]
    assert len({choice.text for choice in answer.choices}) == len(PROMPTS)
    usage, kept = answer.usage, sum(map(kept_heads, truths))
    assert (usage.heads_kept, usage.heads, usage.sparsity) == (kept, 64, 1 - kept / 64)
    assert usage.completion_tokens == sum(truth.lengths[0] for truth in truths)
    assert (usage.sparsity == 0) == (served.model.execution == "dense")
    assert getattr(served.model.executor, "captures", 1) > 0  # captured steps wrote it, where there are any


def test_an_answer_is_streamed(served, library):
    options = {"max_tokens": 14, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client.completions.create(model=NAME, prompt=PROMPTS[1], **options))
    truth = library(PROMPTS[1], 14)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == truth.texts[0]
    assert len(chunks) > 5  # it came in pieces
    assert chunks[-1].usage.heads_kept == kept_heads(truth)


def test_a_stop_text_ends_the_answer_before_it(served, library):
    whole = library(PROMPTS[0], 20).texts[0]
    stop = whole[4:6]
    for stream in (False, True):
        answer = served.client.completions.create(
            model=NAME, prompt=PROMPTS[0], max_tokens=20, stop=["never\x00", stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_seed_draws_what_it_draws_in_the_library(served, library):
    texts = []
    for seed in (7, 8):
        hot = {"max_tokens": 12, "temperature": 1.5, "seed": seed}
        answer = served.client.completions.create(model=NAME, prompt=PROMPTS[:2], **hot)
        for prompt, choice in zip(PROMPTS, answer.choices, strict=False):
            draws = LogitsProcessorList([Draws(1.5, seed)])
            assert choice.text == library(prompt, 12, logits_processor=draws).texts[0]
            texts.append(choice.text)
    assert len({*texts, *(library(prompt, 12).texts[0] for prompt in PROMPTS[:2])}) == 6


def test_each_request_says_how_it_is_pruned(served, library):
    for options in ({"pruning": False}, {"keep_ratio": 0.4}, {"keep_ratio": 0.9}):
        answer = served.client.completions.create(model=NAME, prompt=PROMPTS[2], max_tokens=12, extra_body=options)
        truth = library(PROMPTS[2], 12, **options)
        assert answer.choices[0].text == truth.texts[0]
        assert answer.usage.heads_kept == kept_heads(truth)


def test_requests_that_share_a_batch_keep_their_answers(served, library):
    """One row ends early, one samples, one streams to its limit: all in one batch behind an answer that is held up."""
    wanted = [
        {"prompt": PROMPTS[0], "max_tokens": 3},
        {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 1.5, "seed": 7},
        {"prompt": PROMPTS[2], "max_tokens": 25},
    ]
    create, batches = partial(served.client.completions.create, model=NAME), served.metric("microglia_batch_rows_count")
    with ThreadPoolExecutor(4) as pool, served.held() as go:
        first = pool.submit(create, prompt=PROMPTS[3], max_tokens=2)
        assert go.reached.wait(60)
        answers = [pool.submit(create, **body) for body in wanted]
        while len(served.app.state.service.worker.waiting) < len(wanted):
            threading.Event().wait(0.01)
        go.set()
        texts = [answer.result().choices[0].text for answer in [first, *answers]]
    assert served.metric("microglia_batch_rows_count") == batches + 2
    truths = [library(PROMPTS[3], 2), library(PROMPTS[0], 3)]
    truths.append(library(PROMPTS[1], 12, logits_processor=LogitsProcessorList([Draws(1.5, 7)])))
    truths.append(library(PROMPTS[2], 25))
    assert texts == [truth.texts[0] for truth in truths]


def test_an_unknown_execution_is_refused_before_anything_is_served():
    with pytest.raises(
        ConfigError, match="execution='graph' is unknown; choose captured, compact, fast, dense or masked"
    ):
        tiny_pruned("graph")
