"""Captured decoding says what masked says, token for token; switching heads captures and moves nothing."""

import contextlib
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from microglia.attach import attached
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution import Captured, Decision, Request
from microglia.execution.captured.variants import Variant
from microglia.generation import generate
from tests.tiny import (
    BACKENDS,
    Fixed,
    positions,
    pruner_of,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
    uneven,
    wild,
)

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
PLAIN = {"max_new_tokens": 10, "eos_token_id": None}


def answer(model, pruner, execution, prompts=PROMPTS, **options):
    options = {**PLAIN, **options}
    return generate(model, tiny_tokenizer(), prompts, pruner, execution=execution, **options).tokens


def kinds(captured):
    (step,) = captured.steps.values()
    return {variant.kind for variant in step.variants}


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "own"])
@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_captured_is_masked(family, backend, make):
    model = tiny_model(family, backend=backend)
    pruner, captured = make(model), Captured(model, block=1, lowest=0.1)
    assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))
    assert kinds(captured) & ({"shared"} if make is uneven else {"rows", "masked"})


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
def test_products_of_a_single_row_may_be_our_own(family):
    model = tiny_model(family, backend="eager")
    pruner, captured = uneven(model), Captured(model, block=1, lowest=0.1)
    captured.model = replace(captured.model, one_row=True)  # as compiled="one-row" has it
    assert answer(model, pruner, captured, PROMPTS[:1]).equal(answer(model, pruner, "masked", PROMPTS[:1]))
    (step,) = captured.steps.values()
    graph = step.pieces[step.parts[0]]
    products = [function for function, *_ in graph.calls if function.name().startswith("microglia::product_of_one_row")]
    assert len(products) == {"llama": 7, "phi3": 4, "gpt2": 0, "gemma2": 7}[family]  # every projection of a layer


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_pruned_heads_leave_behind(family, rows):
    model = tiny_model(family)
    pruner, captured = uneven(model, rows, fill="mean"), Captured(model, block=2)
    assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("lowest", [0.1, 0.5, 1.0])
def test_any_buckets_say_the_same(block, lowest):
    """Sites that keep less than their bucket are filled up with heads that add nothing."""
    model = tiny_model("qwen2")
    for pruner in (uneven(model), uneven(model, 3)):
        captured = Captured(model, block=block, lowest=lowest)
        assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))


def test_switching_heads_captures_nothing_and_moves_nothing():
    model = tiny_model("phi3")
    captured = Captured(model, block=1, lowest=0.1)
    pruners = [uneven(model), uneven(model, 3), None, wild(model)]

    def places():
        (step,) = captured.steps.values()
        buffers = step.buffers
        tensors = [*step.decision.keep, buffers.token, buffers.logits, buffers.answer, *step.edges]
        tensors += [x for layer in step.cache.layers for x in (layer.keys, layer.values)]
        tensors += [x for weights in captured.model.weights for x in weights.flat.values()]
        return [x.data_ptr() for x in tensors]

    truths = [answer(model, pruner, "masked") for pruner in pruners]
    first = [answer(model, pruner, captured) for pruner in pruners]
    captures, before = captured.captures, places()
    again = [answer(model, pruner, captured) for pruner in reversed(pruners)][::-1]
    assert captured.captures == captures
    assert places() == before
    for a, b, truth in zip(first, again, truths, strict=True):
        assert a.equal(truth)
        assert b.equal(truth)


def test_each_bucket_is_captured_once():
    model = tiny_model("llama")
    captured, counts = Captured(model, block=1), []
    for kept in (8, 7, 6, 5, 4, 7, 8, 3, 6):
        logits = [torch.where(torch.arange(8) < kept, 1.0, -1.0)[None] for _ in range(2)]
        pruner = pruner_of(Fixed(logits))
        assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))
        counts.append(captured.captures)
    assert counts == [1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_buckets_are_views_of_one_buffer():
    model = tiny_model("qwen2")
    captured = Captured(model, lowest=0.1)
    for weights in captured.model.weights:
        for (projection, part), flat in weights.flat.items():
            for cuts in weights.cuts.values():
                views = [weights.view(cut, part) for cut in cuts if cut.projection == projection]
                assert all(view.data_ptr() == flat.data_ptr() and view.is_contiguous() for view in views)


class Silent:
    """Captures nothing. Under a tape nothing is compiled; under a CUDA graph it is, and so it is under this."""

    recording = staticmethod(contextlib.nullcontext)
    begin = end = replay = staticmethod(lambda: None)

    def graph(self):
        return self


@pytest.mark.parametrize(
    ("attention", "one_row", "rows"),
    [("stock", False, 3), ("products", False, 3), ("kernel", False, 3), ("kernel", True, 1)],
)
def test_one_compiled_code_serves_all_layers(attention, one_row, rows):
    """A variant costs one compilation, not one for each layer: what differs between layers is data.

    Keys and values go in as the views that the bucket uses. Cut out of the whole cache within compiled code, they would
    be written to a copy.
    """
    compilations = []
    for layers in (2, 4):
        torch.compiler.reset()
        graphs = []

        def backend(module, inputs, graphs=graphs):
            graphs.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4])
            return module.forward

        model = tiny_model("llama", num_hidden_layers=layers)
        compiler = functools.partial(torch.compile, backend=backend, dynamic=False)
        captured = Captured(model, block=1, compiled=compiler, attention=attention, capture=Silent())
        captured.model = replace(captured.model, one_row=one_row)
        step, counts = captured.step_for(rows, 64), [len(graphs)]
        bucket = captured.model.buckets[1]
        with torch.inference_mode():
            for kind in ("shared", "rows"):
                step.prepare(Variant(kind, bucket))
                counts.append(len(graphs))
        compilations.append(counts)
        for part in graphs:
            assert all(shape[0] in (bucket.groups, 8) for shape in part if shape[2] == 64)
        assert any((bucket.groups, rows, 64, 6) in part for part in graphs)
    assert compilations[0] == compilations[1]
    pieces = [after - before for before, after in itertools.pairwise(compilations[0])]
    assert min(pieces) > 0
    assert pieces == [1, 1] or attention == "stock"  # in the other ways, a layer is one piece of code


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
@pytest.mark.parametrize("attention", ["products", "kernel"])
def test_attention_in_other_ways_says_the_same(family, backend, attention):
    model = tiny_model(family, backend=backend)
    for pruner in (uneven(model), uneven(model, 3)):
        captured = Captured(model, block=1, lowest=0.1, attention=attention)
        assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))


@pytest.mark.parametrize("attention", ["stock", "products", "kernel"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_in_half_precision_the_error_is_the_masked_models(rows, attention):
    """At most twice its error against float32, over a few steps with given tokens."""
    ids, mask = tiny_prompts(9, 6, 4)
    tokens = torch.tensor([[5, 9, 30, 7], [11, 40, 8, 3], [60, 2, 5, 21]])

    def logits(dtype, captured=None):
        model = tiny_model("qwen2", dtype=dtype)
        execution = Captured(model, block=1, lowest=0.1, attention=attention) if captured else "masked"
        with contextlib.ExitStack() as stack, torch.inference_mode():
            stack.enter_context(attached(model, uneven(model, rows), execution))
            cache = stack.enter_context(execution.prepared(Request(mask, 6))).cache if captured else None
            out = model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True)
            after, whole = [], mask
            for token in tokens.split(1, 1):
                whole = torch.cat([whole, torch.ones_like(token)], 1)
                place = positions(whole)[:, -1:]
                cache = out.past_key_values
                out = model(token, attention_mask=whole, position_ids=place, past_key_values=cache)
                after.append(out.logits[:, -1].float().clone())
        return torch.stack(after)

    truth = logits(torch.float32)
    torch.testing.assert_close(logits(torch.float32, captured=True), truth, atol=2e-5, rtol=0)
    ours, theirs = ((logits(torch.bfloat16, captured) - truth).abs().mean() for captured in (True, None))
    assert theirs > 0
    assert ours <= 2 * theirs


def test_a_mask_is_made_once_for_all_layers_and_only_added():
    model = tiny_model("llama", num_hidden_layers=3)
    step = Captured(model).step_for(2, 64)
    masks = [kwargs["attention_mask"] for _, kwargs in step.inputs]
    assert {mask.data_ptr() for mask in masks} == {masks[0].data_ptr()}
    assert masks[0].dtype == model.dtype


def test_a_merged_adapter_is_followed():
    model = peft_model()
    with pytest.raises(MicrogliaError, match=r"q_proj carries an adapter, .* merge it first"):
        Captured(model)
    pruner, merged = uneven(model), model.merge_and_unload()
    with_adapter = answer(merged, pruner, "captured")
    assert with_adapter.equal(answer(merged, pruner, "masked"))
    assert not with_adapter.equal(answer(tiny_model("llama"), pruner, "masked"))


def peft_model():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), config).eval()


def test_an_error_while_capturing_leaves_nothing_open(monkeypatch):
    model = tiny_model("llama")
    captured, pruner = Captured(model), uneven(model)
    truth = answer(model, pruner, "masked")

    def fails(*args, **kwargs):
        if captured.capture.opened:
            raise torch.OutOfMemoryError("no memory")
        return plain(*args, **kwargs)

    plain = model.model.layers[1].mlp.forward
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        answer(model, pruner, captured)
    monkeypatch.undo()
    assert captured.capture.opened == []
    assert answer(model, pruner, "masked").equal(truth)
    assert answer(model, pruner, captured).equal(truth)


def test_a_longer_step_serves_too_but_not_one_of_another_batch():
    captured = Captured(tiny_model("llama"))
    long = captured.step_for(2, 100)
    assert long.buffers.length == 128
    assert captured.step_for(2, 64) is long
    assert captured.step_for(1, 64) is not long
    assert captured.step_for(3, 64).buffers.batch == 3
    assert [key[0] for key in captured.steps] == [1, 3]  # the one used longest ago has gone


def test_an_answer_ends_with_its_end_token():
    model = tiny_model("llama")
    pruner = uneven(model)
    whole = answer(model, pruner, "masked", max_new_tokens=40)
    for end in ([int(whole[0, 4])], [int(whole[0, 2]), int(whole[1, 6]), int(whole[2, 9])]):
        options = {"max_new_tokens": 40, "eos_token_id": end}
        assert answer(model, pruner, "captured", **options).equal(answer(model, pruner, "masked", **options))


def test_a_plain_greedy_answer_is_a_loop_of_replays(monkeypatch):
    """Not the model's own loop, which looks at tokens, masks and criteria between steps."""
    model = tiny_model("llama")
    truth, captured = answer(model, uneven(model), "masked"), Captured(model)
    monkeypatch.setattr(type(model), "generate", None)
    assert answer(model, uneven(model), captured).equal(truth)


def test_sampling_and_streaming_are_the_models_own():
    model = tiny_model("phi3")
    captured, answers, streamed = Captured(model), [], []

    class Streamer:
        put = staticmethod(lambda tokens: streamed.append(tokens))
        end = staticmethod(lambda: streamed.append("end"))

    for execution in ("masked", captured):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": 0.7, "min_new_tokens": 3}
        answers.append(answer(model, wild(model), execution, **options))
    assert answers[0].equal(answers[1])
    alone = answer(model, uneven(model), captured, prompts=PROMPTS[:1], streamer=Streamer())
    assert [int(tokens) for tokens in streamed[1:-1]] == alone[0].tolist()
    assert streamed[-1] == "end"


def test_the_model_comes_back(snapshot):
    model = tiny_model("phi3")
    before = snapshot(model)
    answer(model, wild(model, fill="mean"), "captured")
    assert snapshot(model) == before


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_captured_step_cannot_follow_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="beams and several answers to a prompt move rows of the captured cache"):
        answer(model, uneven(model), "captured", num_beams=2)
    captured = Captured(model)
    with pytest.raises(MicrogliaError, match="the prompt was not read into the cache of this captured execution"):
        captured.apply([], Decision([]), cache=None).__enter__()
    with pytest.raises(ConfigError, match="attention='flash' is unknown; choose stock, products, kernel or auto"):
        Captured(model, attention="flash")
    with pytest.raises(
        ConfigError, match="compiled='reduce-overhead' is unknown; choose default, coordinate-descent, one-row, max"
    ):
        Captured(model, compiled="reduce-overhead")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="attention by 'flash_attention_2' takes no mask"):
        Captured(model)


def test_too_long_an_answer_is_refused():
    model = tiny_model("llama")
    captured = Captured(model)
    ids = torch.ones(1, 60, dtype=torch.long)
    with torch.inference_mode(), captured.serving(Request(torch.ones_like(ids), 2)) as step:
        model(ids, past_key_values=step.cache)
        for _ in range(4):
            model(ids[:, :1], past_key_values=step.cache)
        with pytest.raises(MicrogliaError, match=r"up to 64 in all, but tokens of shape .* came after 64"):
            model(ids[:, :1], past_key_values=step.cache)
