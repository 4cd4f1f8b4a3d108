"""Rotary embeddings that change with the length: an answer keeps its prompt's; a request that crosses is refused."""

import pytest
import torch

from microglia.errors import UnsupportedModelError
from microglia.execution import Captured, Request
from tests.execution.captured.test_captured import PROMPTS, answer
from tests.tiny import tiny_model, uneven

LIMIT = 30
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [4.0, 6.0, 9.0],
    "original_max_position_embeddings": LIMIT,
    "factor": 8.0,
}
OWN = {"original_max_position_embeddings": LIMIT}  # Phi-3's config has it a second time, and that one counts
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGER = ["3+4*5-6/2=" * 4, "7*8-2" * 3]  # 40 and 15 tokens


@pytest.mark.parametrize("prompts", [PROMPTS, LONGER], ids=["short", "long"])
def test_longrope_keeps_the_factors_of_the_prompt(prompts):
    """One model after the other, in both orders: what the last request left behind must not matter."""
    model = tiny_model("phi3", rope_parameters=LONG, **OWN)
    captured, pruner = Captured(model), uneven(model, len(prompts))
    for others in (PROMPTS, LONGER):
        assert answer(model, None, captured, prompts=others).equal(answer(model, None, "masked", prompts=others))
        ours = answer(model, pruner, captured, prompts=prompts)
        assert ours.equal(answer(model, pruner, "masked", prompts=prompts))


@pytest.mark.parametrize("prompts", [PROMPTS, LONGER], ids=["short", "long"])
def test_sampling_with_longrope_is_the_models_own(prompts):
    model, answers = tiny_model("phi3", rope_parameters=LONG, **OWN), []
    for execution in ("masked", "captured"):
        torch.manual_seed(0)
        pruner = uneven(model, len(prompts))
        answers.append(answer(model, pruner, execution, prompts=prompts, do_sample=True, temperature=0.7))
    assert answers[0].equal(answers[1])


def test_short_and_long_factors_differ():
    """Else the test above would say nothing."""
    short = tiny_model("phi3", rope_parameters={**LONG, "long_factor": LONG["short_factor"]}, **OWN)
    long = tiny_model("phi3", rope_parameters=LONG, **OWN)
    assert not answer(short, None, "captured", prompts=LONGER).equal(answer(long, None, "captured", prompts=LONGER))


def test_dynamic_is_followed_up_to_the_original_length():
    model = tiny_model("llama", rope_parameters=DYNAMIC)
    pruner = uneven(model)
    assert answer(model, pruner, "captured").equal(answer(model, pruner, "masked"))


@pytest.mark.parametrize(("family", "parameters"), [("phi3", LONG), ("llama", DYNAMIC)])
def test_a_request_that_crosses_is_refused(family, parameters):
    own = OWN if parameters is LONG else {"max_position_embeddings": LIMIT}
    model = tiny_model(family, rope_parameters=parameters, **own)
    captured, mask = Captured(model), torch.ones(1, 20, dtype=torch.long)
    with captured.serving(Request(mask, LIMIT - 20 + 1)):
        pass  # the last new token is never read
    with pytest.raises(UnsupportedModelError, match=rf"20 tokens .* and 12 new ones cross the length of {LIMIT}"):
        captured.serving(Request(mask, LIMIT - 20 + 2)).__enter__()
    beyond = torch.ones(1, LIMIT + 1, dtype=torch.long)
    if parameters is DYNAMIC:
        with pytest.raises(UnsupportedModelError, match=r"changes its rotary embedding \(dynamic\)"):
            captured.serving(Request(beyond, 1)).__enter__()
    else:
        with captured.serving(Request(beyond, 100)):
            pass
