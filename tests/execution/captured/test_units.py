"""Captured steps without channels and sublayers say what masked ones say; what is gone is not launched."""

import functools
import itertools

import pytest
import torch

from microglia.attach import attached
from microglia.execution import Captured, Decision, Request
from microglia.execution.captured.channels import MlpShape, channel_buckets
from microglia.generation import generate
from microglia.units import Arrangement, find_sites
from tests.execution.captured.test_captured import Silent
from tests.tiny import pruner_of, positions, tiny_model, tiny_prompts, tiny_tokenizer, Fixed
from tests.units.many import KINDS, LAYERS, deep_model, some

IDS, MASK = tiny_prompts(14, 9, 3)
TOKENS = tiny_prompts(5, 5, 5, seed=2)[0]
PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
ROWS = pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
UNITS = pytest.mark.parametrize("units", [("channel",), ("sublayer",), KINDS], ids="+".join)


@torch.inference_mode()
def logits(model, pruner, execution, ids=IDS, mask=MASK, tokens=TOKENS):
    """(B, 1 + N, V), of the prompt's last token and after each of these tokens (B, N)."""
    prepared = execution.prepared(Request(mask, 8, fill=pruner.fill == "mean")) if execution != "masked" else None
    with attached(model, pruner, execution):
        cache = prepared and prepared.__enter__().cache
        out = model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True)
        after = [out.logits[:, -1].clone()]
        for token in tokens.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            place = positions(mask)[:, -1:]
            out = model(token, attention_mask=mask, position_ids=place, past_key_values=out.past_key_values)
            after.append(out.logits[:, -1].clone())
        if prepared:
            prepared.__exit__(None, None, None)
    return torch.stack(after, 1)


def answer(model, pruner, execution):
    options = {"max_new_tokens": 10, "eos_token_id": None}
    return generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **options).tokens


@ROWS
@UNITS
@pytest.mark.parametrize("block", [1, 2])
def test_captured_is_masked(family, units, rows, block):
    model = deep_model(family)
    pruner, captured = some(model, rows, units), Captured(model, block=block, lowest=0.1)
    masked = logits(model, pruner, "masked")
    torch.testing.assert_close(logits(model, pruner, captured), masked, atol=3e-5, rtol=0)
    assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))


@ROWS
def test_masked_steps_compute_everything_and_say_the_same(family, rows):
    model = deep_model(family)
    pruner = some(model, rows)
    captured, truth = Captured(model, block=2), logits(model, pruner, "masked")
    apply, captured.apply = captured.apply, None
    captured.apply = functools.partial(apply, masked=True)
    torch.testing.assert_close(logits(model, pruner, captured), truth, atol=3e-5, rtol=0)
    (step,) = captured.steps.values()
    assert {variant.kind for variant in step.variants} <= {"dense", "masked"}
    assert not any(any(variant.gone) or (variant.mlp and variant.mlp.is_cut) for variant in step.variants)
