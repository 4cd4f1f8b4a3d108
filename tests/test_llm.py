"""Real models: what they say, where an answer ends, and that attaching changes nothing while all is kept.

SmolLM2 is tested wherever it was fetched; the larger ones too with MICROGLIA_LLM=1, which also fetches what is missing.
"""

import os

import pytest
import torch

from microglia.anatomy import Anatomy
from microglia.attach import attached
from microglia.catalogue.cache import kept
from microglia.catalogue.fetch import fetch
from microglia.catalogue.known import KNOWN
from microglia.errors import MicrogliaError
from microglia.generation import generate
from microglia.models import load_model, source_of
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.settings import end_tokens
from microglia.units import find_sites

pytestmark = [pytest.mark.llm, pytest.mark.slow]
ALL = os.environ.get("MICROGLIA_LLM") == "1"
# Parameters, embeddings counted once; KV groups and query heads of a layer; the ends of an answer.
SHAPES = {
    "smollm2": (134_515_008, 3, 9, ["<|im_end|>", "<|endoftext|>"]),
    "gemma3-270m": (268_098_176, 1, 4, ["<eos>", "<end_of_turn>"]),
    "qwen2.5-coder-0.5b": (494_032_768, 2, 14, ["<|im_end|>", "<|endoftext|>"]),
    "qwen2.5-coder-1.5b": (1_543_714_304, 2, 12, ["<|im_end|>", "<|endoftext|>"]),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def loaded(request):
    """Name, model in float32 and tokenizer of each in turn."""
    name = request.param
    if name != "smollm2" and not ALL:
        pytest.skip(f"{name} is tested with MICROGLIA_LLM=1")
    if kept(KNOWN[name].sha256) is None:
        if not ALL:
            pytest.skip(f"{name} has not been fetched; microglia models fetch {name}")
        try:
            fetch(name)
        except MicrogliaError as error:
            pytest.skip(str(error))
    return name, *load_model(name, device="cpu")


def test_it_is_the_model_of_the_table(loaded):
    name, lm, tokenizer = loaded
    parameters, groups, heads, ends = SHAPES[name]
    assert sum(p.numel() for p in lm.parameters()) == parameters
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert {(g.kv_heads, g.heads) for g in (layer.heads for layer in Anatomy(lm).layers)} == {(groups, heads)}
    assert [tokenizer.decode([token]) for token in end_tokens(lm, tokenizer)] == ends
    assert source_of(lm) == name


def test_it_knows_the_capital_of_france(loaded):
    name, lm, tokenizer = loaded
    if not tokenizer.chat_template:
        pytest.skip(f"{name} is a base model: it goes on about the capital without naming it")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [
        "The capital of France is",
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False),
    ]
    answers = [generate(lm, tokenizer, [prompt], max_new_tokens=24) for prompt in prompts]
    assert ["Paris" in answer.texts[0] for answer in answers] == [True] * len(answers)
    assert answers[1].lengths[0] < 24  # it stopped by itself


def test_all_kept_is_untouched_token_for_token(loaded):
    _, lm, tokenizer = loaded
    pruner = Pruner(StaticPolicy.all_kept([site.geometry for site in find_sites(lm)]))
    inputs = tokenizer(["Explain in two sentences why the sky is blue."], return_tensors="pt")
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    untouched = lm.generate(**inputs, **options)
    for execution in ("masked", "compact"):
        with attached(lm, pruner, execution=execution):
            assert torch.equal(lm.generate(**inputs, **options), untouched), execution


def test_some_pruned_is_another_answer_masked_and_compact_alike(loaded):
    """A gate that did nothing would pass the test above."""
    _, lm, tokenizer = loaded
    sites = find_sites(lm)
    logits = [torch.ones(site.geometry.count) for site in sites]
    for site, row in zip(sites, logits, strict=True):
        groups = row.view(site.geometry.kv_heads, -1)
        groups[:, : groups.shape[1] // 2] = -1
    inputs = tokenizer(["Explain in two sentences why the sky is blue."], return_tensors="pt")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    answers = []
    for execution in ("dense", "masked", "compact"):
        with attached(lm, Pruner(StaticPolicy(logits)), execution=execution):
            answers.append(lm.generate(**inputs, **options))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])
