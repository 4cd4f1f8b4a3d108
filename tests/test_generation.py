"""generate(): the compacted path says what the masked path says, token for token, and what cannot work is refused."""

import accelerate
import pytest
import torch

from microglia.attach import attached
from microglia.compact import compacted
from microglia.errors import ConfigError, DataError
from microglia.gate import Gate
from microglia.generation import encode_prompts, generate
from tests.tiny import BACKENDS, tiny_model, tiny_tokenizer, uneven_policy, wild_policy

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
ONE = Gate(bucket=1)
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10}


def both(model, policy, **options):
    options = {"gate": ONE, **LENGTH, **options}
    masked, compact = (
        generate(model, tiny_tokenizer(), PROMPTS, policy, path=path, **options) for path in ("masked", "compact")
    )
    assert masked.tokens.shape == (3, 10)
    assert all(a.equal(b) for a, b in zip(masked.keep, compact.keep, strict=True))
    return masked.tokens, compact.tokens


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_greedy_compact_is_greedy_masked(family, backend):
    model = tiny_model(family, backend=backend)
    masked, compact = both(model, wild_policy(model))
    assert compact.equal(masked)


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_both_fills_and_both_kinds_of_decision(family, fill, rows):
    model = tiny_model(family)
    masked, compact = both(model, uneven_policy(model, rows), fill=fill)
    assert compact.equal(masked)
    assert not masked.equal(generate(model, tiny_tokenizer(), PROMPTS, **LENGTH).tokens)


@pytest.mark.parametrize("make", [uneven_policy, wild_policy], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gpt2"])
def test_sampling_with_the_same_seed(family, make):
    model = tiny_model(family)
    policy, tokens = make(model), []
    for path in ("masked", "compact"):
        torch.manual_seed(0)
        tokens.append(
            generate(model, tiny_tokenizer(), PROMPTS, policy, gate=ONE, path=path, do_sample=True, **LENGTH).tokens
        )
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("make", [uneven_policy, wild_policy], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_beams_share_the_decision_of_their_prompt(family, make, fill):
    model = tiny_model(family)
    policy = make(model)
    masked, compact = both(model, policy, num_beams=3, fill=fill)
    assert compact.equal(masked)
    keep = generate(model, tiny_tokenizer(), PROMPTS, policy, gate=ONE, num_beams=3, **LENGTH).keep
    single = generate(model, tiny_tokenizer(), PROMPTS, policy, gate=ONE, **LENGTH).keep
    assert all(a.equal(b.repeat_interleave(3, dim=0)) for a, b in zip(keep, single, strict=True))


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_a_static_cache_decides_and_says_the_same(family, backend):
    model = tiny_model(family, backend=backend)
    policy, options = wild_policy(model), {"gate": ONE, **LENGTH}
    dynamic = generate(model, tiny_tokenizer(), PROMPTS, policy, **options)
    for path in ("masked", "compact"):
        static = generate(model, tiny_tokenizer(), PROMPTS, policy, path=path, cache_implementation="static", **options)
        assert all(a.equal(b) for a, b in zip(static.keep, dynamic.keep, strict=True))
        assert static.tokens.equal(dynamic.tokens)


def test_rows_say_alone_what_they_say_in_a_batch(family):
    model = tiny_model(family)
    policy = wild_policy(model)
    together = generate(model, tiny_tokenizer(), PROMPTS, policy, gate=ONE, **LENGTH)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, tiny_tokenizer(), [prompt], policy, gate=ONE, **LENGTH)
        assert alone.tokens.equal(together.tokens[row : row + 1])
        assert alone.texts == together.texts[row : row + 1]


def test_an_offloaded_model_says_the_same():
    model = tiny_model("llama")
    policy = wild_policy(model)
    truth = generate(model, tiny_tokenizer(), PROMPTS, policy, gate=ONE, **LENGTH)
    offloaded = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
    assert generate(offloaded, tiny_tokenizer(), PROMPTS, policy, gate=ONE, **LENGTH).tokens.equal(truth.tokens)


def test_without_a_policy_the_model_stays_dense():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    output = generate(model, tokenizer, PROMPTS, **LENGTH)
    truth = model.generate(**tokenizer(PROMPTS, return_tensors="pt", padding=True), do_sample=False, **LENGTH)
    assert output.tokens.equal(truth[:, -10:])
    assert output.keep == []
    assert len(output.texts) == 3


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_says():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    batch = encode_prompts(tiny_model("llama"), tokenizer, PROMPTS, 8)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt) for prompt in PROMPTS]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "no prompt was given; give at least one"),
        (["x", "  "], "prompt 1 of 2 is empty; give every prompt some text"),
        (
            ["x" * 250],
            "the longest prompt has 250 tokens and 10 new ones were asked for, but the model's context is 256",
        ),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompts, sentence):
    model = tiny_model("llama")
    with pytest.raises(DataError, match=sentence):
        generate(model, tiny_tokenizer(), prompts, uneven_policy(model), max_new_tokens=10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": "scenic"}, "path='scenic' is unknown; choose masked, compact or graph"),
        ({"assistant_model": tiny_model("llama")}, "assistant_model reads the prompt in parts or with guesses"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens reads the prompt in parts or with guesses"),
        ({"prefill_chunk_size": 3}, "prefill_chunk_size reads the prompt in parts or with guesses"),
        ({"use_cache": False}, "use_cache=False reads the prompt again for every token"),
    ],
)
def test_options_that_leave_nothing_to_decide_on_are_refused(options, sentence):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=sentence):
        generate(model, tiny_tokenizer(), PROMPTS, uneven_policy(model), **options)


@pytest.mark.parametrize("where", ["streamer", "logits_processor"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_an_interrupted_generation_restores_the_model(where, error, rows, snapshot):
    model = tiny_model("phi3")
    before, calls = snapshot(model), []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error("enough")
        return args[-1]

    class Streamer:
        put = staticmethod(interrupt)

    options = {"streamer": Streamer()} if where == "streamer" else {"logits_processor": [interrupt]}
    with pytest.raises(error, match="enough") as caught:
        generate(model, tiny_tokenizer(), PROMPTS, uneven_policy(model, rows), gate=ONE, **LENGTH, **options)
    assert caught.tb is not None  # held on purpose: what restores the model must not be the garbage collector
    assert len(calls) == 3
    assert snapshot(model) == before
    with attached(model, uneven_policy(model, rows), pruning=compacted):
        pass  # the lock is free again
