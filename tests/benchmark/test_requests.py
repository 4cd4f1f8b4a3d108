"""Whole requests: the same prompts for all, every part timed, and charged to who needs it."""

import json
from dataclasses import asdict

import pytest
import torch

from microglia.benchmark import (
    TimedRun,
    fixed_prompts,
    request_time,
    step_speed,
    step_time,
    time_requests,
)
from microglia.benchmark import requests as module
from microglia.errors import ConfigError, DataError
from microglia.execution import Captured
from microglia.gate import Gate, keep_ratio
from microglia.generation import generate
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.reading import read_prompts
from tests.tiny import geometries_of, tiny_model, tiny_tokenizer, wild

PROMPTS = ["abcdefgh", "12+34=?", "Zebra!", "(x-y)*z", "qrstuvwxyz", "Seven?"]
LENGTHS = [5, 3, 9, 4, 7, 2]


def fixed(model, **options):
    return fixed_prompts(model, tiny_tokenizer(), PROMPTS, LENGTHS, **options)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that only counts: every piece of work takes 1, a decode step of an answer 1 more per token."""
    passes = []

    def clock(self, work):
        before = len(passes)
        work()
        return 1.0 + len(passes) - before

    monkeypatch.setattr("microglia.benchmark.latency.Clock.__call__", clock)
    return passes


def test_the_prompts_are_drawn_once_and_spread_over_the_lengths() -> None:
    model = tiny_model("llama")
    chosen = fixed(model, count=3)
    assert [one.tokens for one in chosen] == [one.tokens for one in fixed(model, count=3)]
    for one, stretch in zip(chosen, ((2, 3), (4, 5), (7, 9)), strict=True):
        assert one.tokens in stretch
        assert one.ids.shape == (1, len(PROMPTS[LENGTHS.index(one.tokens)]))
    drawn = {tuple(one.tokens for one in fixed(model, count=3, seed=seed)) for seed in range(9)}
    assert len(drawn) > 1
    assert [one.tokens for one in fixed(model)] == sorted(LENGTHS)  # all there are, where there are fewer
    with pytest.raises(DataError, match="6 prompts and 1 lengths of answers were given to time"):
        fixed_prompts(model, tiny_tokenizer(), PROMPTS, [3])


def test_every_part_is_charged_to_who_needs_it(ticking) -> None:
    """Counted, not measured: a request reads (1), decides (1), slices (1) and steps (1 each)."""
    model = tiny_model("llama")
    model.register_forward_hook(lambda *_: ticking.append(1))
    prompts = fixed(model, count=2)
    steps = sum(one.tokens - 1 for one in prompts) + 2  # and one of the clock for each prompt
    reading = 2 * 2
    dense = time_requests(model, prompts, None, num_runs=2)
    agents = time_requests(model, prompts, wild(model), num_runs=2)
    static = time_requests(
        model, prompts, Pruner(StaticPolicy.random(geometries_of(model), 0), Gate(bucket=1)), num_runs=2
    )
    assert dense.dense == dense.pruned == agents.dense == static.dense == [reading + steps] * 2
    assert agents.pruned == [reading + 2 + 2 + steps] * 2  # decided and sliced for each of the two prompts
    assert static.pruned == [reading + steps] * 2  # once for all
    assert (agents.charged, static.charged) == (("reading", "decision", "slicing", "steps"), ("reading", "steps"))
    assert agents.parts == static.parts == {"reading": 2.0, "decision": 1.0, "slicing": 1.0, "steps": steps / 2}
    assert dense.steps == agents.steps == static.steps == [steps] * 2


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("execution", ["compact", "masked", "captured"])
def test_a_timed_request_writes_the_tokens_of_generate(execution, fill) -> None:
    """A timed request does the work of the library's own: the same decision, and the same tokens after it."""
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    pruner = wild(model, fill=fill)
    (prompt,) = fixed_prompts(model, tokenizer, PROMPTS[:1], [6])
    kept = generate(model, tokenizer, PROMPTS[:1], pruner, execution="compact", max_new_tokens=6)
    seen = []
    if execution == "captured":  # whose steps are replayed, so that no hook would be called
        execution = Captured(model, block=1)
    else:
        model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output[0, -1].argmax().item()))
    timed = time_requests(model, [prompt], pruner, execution, num_runs=1)
    assert timed.keep_ratio == pytest.approx(float(keep_ratio(kept.keep)))
    if not isinstance(execution, Captured):
        assert seen[-6:] == kept.tokens[0].tolist()
    assert timed.tokens == 6


def test_what_a_comparison_reads_of_several_prompts_counts_by_their_tokens() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pruner = wild(model)
    prompts = fixed_prompts(model, tokenizer, PROMPTS, LENGTHS)
    timed = time_requests(model, prompts, pruner, num_runs=2)
    order = sorted(range(6), key=LENGTHS.__getitem__)
    reading = read_prompts(model, tokenizer, [PROMPTS[i] for i in order], pruner)
    weights = torch.tensor(sorted(LENGTHS)).double()
    kept = keep_ratio(reading.keep).double()
    assert len(kept.unique()) > 1
    assert timed.keep_ratio == pytest.approx(float(kept @ weights / weights.sum()), rel=1e-6)
    dense = time_requests(model, prompts, None, num_runs=2)
    assert timed.kv_bytes < dense.kv_bytes  # of the same prompts
    assert dense.bytes[0] == dense.bytes[1] == timed.bytes[0] > timed.bytes[1]
    again = TimedRun.from_json(json.loads(json.dumps(asdict(timed))))
    assert again == timed
    request, step = request_time([timed, again]), step_time([timed])
    assert (request.n, request.prompts, request.tokens) == (4, 6, sum(LENGTHS))
    assert request.ratio_ci95[0] <= request.ratio_to_dense <= request.ratio_ci95[1]
    assert step.ceiling == timed.bytes[0] / timed.bytes[1] > 1
    assert step.ms_per_token > 0


def test_the_model_comes_back_as_it_was_and_speeds_are_looked_up(monkeypatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    geometries = geometries_of(model)
    pruner = wild(model).with_budget(read_prompts(model, tokenizer, PROMPTS, wild(model)).logits, geometries)
    calls = []
    monkeypatch.setattr(module, "time_requests", lambda *a, **k: calls.append(a) or time_requests(*a, **k))
    speed = step_speed(model, fixed(model, count=2), pruner, num_runs=1)
    assert speed(0.5) == speed(0.5) > 0
    assert len(calls) == 1
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ConfigError, match="execution='dense' prunes nothing, so there is no time to compare"):
        time_requests(model, fixed(model, count=1), pruner, "dense")
