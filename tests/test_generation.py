"""generate(): compact says what masked says, token for token, and what cannot work is refused."""

import functools
import threading

import accelerate
import pytest
import torch
from transformers import GenerationConfig

from microglia.attach import attached
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.execution import Captured
from microglia.generation import generate
from microglia.reading import encode_prompts
from tests.tiny import BACKENDS, tiny_model, tiny_tokenizer, uneven, wild

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10}


def both(model, pruner, **options):
    masked, compact = (
        generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **LENGTH, **options)
        for execution in ("masked", "compact")
    )
    assert masked.tokens.shape == (3, 10)
    assert all(a.equal(b) for a, b in zip(masked.keep, compact.keep, strict=True))
    return masked.tokens, compact.tokens


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_greedy_compact_is_greedy_masked(family, backend):
    model = tiny_model(family, backend=backend)
    masked, compact = both(model, wild(model))
    assert compact.equal(masked)


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_both_fills_and_both_kinds_of_decision(family, fill, rows):
    model = tiny_model(family)
    masked, compact = both(model, uneven(model, rows, fill=fill))
    assert compact.equal(masked)
    assert not masked.equal(generate(model, tiny_tokenizer(), PROMPTS, **LENGTH).tokens)


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gpt2"])
def test_sampling_with_the_same_seed(family, make):
    model = tiny_model(family)
    pruner, tokens = make(model), []
    for execution in ("masked", "compact"):
        torch.manual_seed(0)
        tokens.append(
            generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, do_sample=True, **LENGTH).tokens
        )
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_beams_share_the_decision_of_their_prompt(family, make, fill):
    model = tiny_model(family)
    pruner = make(model, fill=fill)
    masked, compact = both(model, pruner, num_beams=3)
    assert compact.equal(masked)
    keep = generate(model, tiny_tokenizer(), PROMPTS, pruner, num_beams=3, **LENGTH).keep
    single = generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH).keep
    assert all(a.equal(b) for a, b in zip(keep, single, strict=True))


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_a_static_cache_decides_and_says_the_same(family, backend):
    model = tiny_model(family, backend=backend)
    pruner = wild(model)
    dynamic = generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH)
    for execution in ("masked", "compact"):
        options = {"execution": execution, "cache_implementation": "static", **LENGTH}
        static = generate(model, tiny_tokenizer(), PROMPTS, pruner, **options)
        assert all(a.equal(b) for a, b in zip(static.keep, dynamic.keep, strict=True))
        assert static.tokens.equal(dynamic.tokens)


def test_rows_say_alone_what_they_say_in_a_batch(family):
    model = tiny_model(family)
    pruner = wild(model)
    together = generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, tiny_tokenizer(), [prompt], pruner, **LENGTH)
        assert alone.tokens.equal(together.tokens[row : row + 1])
        assert alone.texts == together.texts[row : row + 1]


def test_an_offloaded_model_says_the_same():
    model = tiny_model("llama")
    pruner = wild(model)
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH)
    offloaded = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
    assert generate(offloaded, tiny_tokenizer(), PROMPTS, pruner, **LENGTH).tokens.equal(truth.tokens)


def test_without_a_pruner_the_model_stays_dense():
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


@torch.no_grad()
def custom_loop(model, input_ids, generation_config, whole=False, direct=False, **given):
    """A user's greedy loop. whole: it reads everything anew for every token. direct: past the model's hooks."""
    ids, mask, cache = input_ids, given["attention_mask"], None if whole else given["past_key_values"]
    call = model.forward if direct else model
    for step in range(generation_config.max_new_tokens):
        place = (mask.cumsum(1) - 1).clamp(min=0)
        past = ids.shape[1] - 1 if step and not whole else 0
        out = call(
            ids[:, past:], attention_mask=mask, position_ids=place[:, past:], past_key_values=cache, use_cache=not whole
        )
        cache = None if whole else out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask[:, -1:]], 1)
    return ids


@pytest.mark.parametrize("execution", ["masked", "compact", "captured"])
@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "own"])
def test_a_loop_of_the_users_own_is_pruned_like_the_librarys(make, execution):
    model = tiny_model("llama")
    pruner, options = make(model), {"max_new_tokens": 6, "eos_token_id": None}
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution="masked", **options)
    ours = generate(
        model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, custom_generate=custom_loop, **options
    )
    assert ours.tokens.equal(truth.tokens)
    assert all(a.equal(b) for a, b in zip(ours.keep, truth.keep, strict=True))
    assert not ours.tokens.equal(generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=6, eos_token_id=None).tokens)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"whole": True}, "the pass that read the prompt kept no key/value cache"),
        ({"direct": True}, "the model read a whole text 0 times, but a prompt is read once"),
    ],
)
def test_a_loop_in_which_nothing_would_be_pruned_is_refused(how, sentence):
    model = tiny_model("llama")
    loop = functools.partial(custom_loop, **how)
    with pytest.raises(MicrogliaError, match=sentence):
        generate(
            model, tiny_tokenizer(), PROMPTS, uneven(model), execution="masked", custom_generate=loop,
            max_new_tokens=4, eos_token_id=None,
        )  # fmt: skip


def test_a_model_that_is_configured_without_a_cache_is_pruned_all_the_same():
    model = tiny_model("llama")
    pruner = uneven(model)
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH)
    model.generation_config.use_cache = model.config.use_cache = False
    assert generate(model, tiny_tokenizer(), PROMPTS, pruner, **LENGTH).tokens.equal(truth.tokens)


class Meanwhile:
    """A streamer that, at the first new token, lets another thread try to generate on the same model."""

    def __init__(self, work):
        self.work, self.calls, self.result = work, 0, None

    def put(self, value):
        self.calls += 1
        if self.calls == 2:
            thread = threading.Thread(target=self.other)
            thread.start()
            thread.join()

    def other(self):
        try:
            self.result = self.work().tokens
        except MicrogliaError as error:
            self.result = str(error)

    def end(self):
        pass


@pytest.mark.parametrize("theirs", ["dense", "compact", "captured"])
@pytest.mark.parametrize("ours", ["dense", "compact", "captured"])
def test_two_threads_get_right_answers_or_an_error_and_never_mixed_ones(ours, theirs):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pruner, captured = uneven(model), Captured(model)

    def write(execution, prompts, **options):
        execution = captured if execution == "captured" else execution
        return generate(model, tokenizer, prompts, pruner, execution=execution, **LENGTH, **options)

    truth, other = write(ours, PROMPTS[:1]).tokens, write(theirs, PROMPTS[1:2]).tokens
    streamer = Meanwhile(lambda: write(theirs, PROMPTS[1:2]))
    assert write(ours, PROMPTS[:1], streamer=streamer).tokens.equal(truth)
    if ours == theirs == "dense":
        assert streamer.result.equal(other)
    else:
        assert "here or in another thread" in streamer.result


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
        generate(model, tiny_tokenizer(), prompts, uneven(model), max_new_tokens=10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"execution": "scenic"}, "execution='scenic' is unknown; choose captured, compact, fast, dense or masked"),
        ({"assistant_model": tiny_model("llama")}, "assistant_model reads the prompt in parts or with guesses"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens reads the prompt in parts or with guesses"),
        ({"prefill_chunk_size": 3}, "prefill_chunk_size reads the prompt in parts or with guesses"),
        ({"use_cache": False}, "use_cache=False reads the prompt again for every token"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False reads the prompt again"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens reads"),
    ],
)
def test_options_that_leave_nothing_to_decide_on_are_refused(options, sentence):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=sentence):
        generate(model, tiny_tokenizer(), PROMPTS, uneven(model), **options)


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
        generate(model, tiny_tokenizer(), PROMPTS, uneven(model, rows), **LENGTH, **options)
    assert caught.tb is not None  # held on purpose: what restores the model must not be the garbage collector
    assert len(calls) == 3
    assert snapshot(model) == before
    with attached(model, uneven(model, rows), "compact"):
        pass  # the lock is free again
