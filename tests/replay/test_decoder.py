"""Captured decoding says what the masked path says, token for token; switching heads captures and moves nothing."""

import functools

import pytest
import torch

from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.replay import GraphDecoder
from tests.tiny import BACKENDS, Fixed, tiny_model, tiny_tokenizer, uneven_policy, wild_policy

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
ONE = Gate(bucket=1)
PLAIN = {"max_new_tokens": 10, "eos_token_id": None}


def said(model, policy, path, decoder=None, prompts=PROMPTS, **options):
    options = {"gate": ONE, **PLAIN, **options}
    return generate(model, tiny_tokenizer(), prompts, policy, path=path, decoder=decoder, **options).tokens


def kinds(decoder):
    (room,) = decoder.rooms.values()
    return {form.kind for form in room.forms}


@pytest.mark.parametrize("make", [uneven_policy, wild_policy], ids=["shared", "own"])
@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_captured_is_masked(family, backend, make):
    model = tiny_model(family, backend=backend)
    policy, decoder = make(model), GraphDecoder(model, stretch=1, lowest=0.1)
    assert said(model, policy, "graph", decoder).equal(said(model, policy, "masked"))
    assert kinds(decoder) & ({"shared"} if make is uneven_policy else {"rows", "masked"})


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_pruned_heads_leave_behind(family, rows):
    model = tiny_model(family)
    policy, decoder = uneven_policy(model, rows), GraphDecoder(model, stretch=2)
    assert said(model, policy, "graph", decoder, fill="mean").equal(said(model, policy, "masked", fill="mean"))


@pytest.mark.parametrize("stretch", [1, 2])
@pytest.mark.parametrize("lowest", [0.1, 0.5, 1.0])
def test_any_ladder_says_the_same(stretch, lowest):
    """Sites that ask for less than their level are filled up with heads that add nothing."""
    model = tiny_model("qwen2")
    for policy in (uneven_policy(model), uneven_policy(model, 3)):
        decoder = GraphDecoder(model, stretch=stretch, lowest=lowest)
        assert said(model, policy, "graph", decoder).equal(said(model, policy, "masked"))


def test_switching_heads_captures_nothing_and_moves_nothing():
    model = tiny_model("phi3")
    decoder = GraphDecoder(model, stretch=1, lowest=0.1)
    policies = [uneven_policy(model), uneven_policy(model, 3), None, wild_policy(model)]

    def places():
        (room,) = decoder.rooms.values()
        tensors = [*room.keep, room.token, room.logits, room.answer, *room.edges]
        tensors += [x for layer in room.cache.layers for x in (layer.keys, layer.values)]
        tensors += [x for weights in decoder.parts.weights for x in weights.flat.values()]
        return [x.data_ptr() for x in tensors]

    truths = [said(model, policy, "masked") for policy in policies]
    first = [said(model, policy, "graph", decoder) for policy in policies]
    captures, before = decoder.captures, places()
    again = [said(model, policy, "graph", decoder) for policy in reversed(policies)][::-1]
    assert decoder.captures == captures
    assert places() == before
    for a, b, truth in zip(first, again, truths, strict=True):
        assert a.equal(truth)
        assert b.equal(truth)


def test_each_level_is_captured_once():
    model = tiny_model("llama")
    decoder = GraphDecoder(model, stretch=1)
    seen = []
    for kept in (8, 7, 6, 5, 4, 7, 8, 3, 6):
        logits = [torch.where(torch.arange(8) < kept, 1.0, -1.0)[None] for _ in range(2)]
        assert said(model, Fixed(logits), "graph", decoder).equal(said(model, Fixed(logits), "masked"))
        seen.append(decoder.captures)
    assert seen == [1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_levels_are_views_of_one_buffer():
    model = tiny_model("qwen2")
    decoder = GraphDecoder(model, lowest=0.1)
    for weights in decoder.parts.weights:
        for (projection, part), flat in weights.flat.items():
            for cuts in weights.cuts.values():
                views = [weights.view(cut, part) for cut in cuts if cut.projection == projection]
                assert all(view.data_ptr() == flat.data_ptr() and view.is_contiguous() for view in views)


def test_one_compiled_code_serves_all_layers():
    """A level costs one compilation, not one for each layer: what differs between layers is data."""
    from torch._dynamo.testing import CompileCounter  # seconds to import

    frames = []
    for layers in (2, 4):
        torch.compiler.reset()
        counter = CompileCounter()
        model = tiny_model("llama", num_hidden_layers=layers)
        compiler = functools.partial(torch.compile, backend=counter, dynamic=False)
        decoder = GraphDecoder(model, stretch=1, compiled=compiler)
        policy = Fixed([torch.where(torch.arange(8) < 6, 1.0, -1.0)[None]] * layers)
        assert said(model, policy, "graph", decoder).equal(said(model, policy, "masked"))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]
    assert frames[0] > 0


def test_a_longer_room_serves_too_but_not_one_of_another_batch():
    decoder = GraphDecoder(tiny_model("llama"))
    long = decoder.room(2, 100)
    assert long.length == 128
    assert decoder.room(2, 64) is long
    assert decoder.room(1, 64) is not long
    assert decoder.room(3, 64).batch == 3
    assert [key[0] for key in decoder.rooms] == [1, 3]  # the one used longest ago has gone


def test_an_answer_ends_with_its_end_token():
    model = tiny_model("llama")
    policy = uneven_policy(model)
    whole = said(model, policy, "masked", max_new_tokens=40)
    for end in ([int(whole[0, 4])], [int(whole[0, 2]), int(whole[1, 6]), int(whole[2, 9])]):
        options = {"max_new_tokens": 40, "eos_token_id": end}
        assert said(model, policy, "graph", **options).equal(said(model, policy, "masked", **options))


def test_sampling_and_streaming_are_the_models_own():
    model = tiny_model("phi3")
    decoder, answers, streamed = GraphDecoder(model), [], []

    class Streamer:
        put = staticmethod(lambda tokens: streamed.append(tokens))
        end = staticmethod(lambda: streamed.append("end"))

    for path in ("masked", "graph"):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": 0.7, "min_new_tokens": 3}
        answers.append(said(model, wild_policy(model), path, decoder, **options))
    assert answers[0].equal(answers[1])
    alone = said(model, uneven_policy(model), "graph", decoder, prompts=PROMPTS[:1], streamer=Streamer())
    assert [int(tokens) for tokens in streamed[1:-1]] == alone[0].tolist()
    assert streamed[-1] == "end"


def test_the_model_comes_back(snapshot):
    model = tiny_model("phi3")
    before = snapshot(model)
    said(model, wild_policy(model), "graph", fill="mean")
    assert snapshot(model) == before


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_captured_step_cannot_follow_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="beams and several answers to a prompt move rows of the captured cache"):
        said(model, uneven_policy(model), "graph", num_beams=2)
    decoder = GraphDecoder(model)
    with pytest.raises(MicrogliaError, match="the prompt was not read into this decoder's cache"):
        decoder.pruning([], [], cache=None).__enter__()
    moving = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UnsupportedModelError, match=r"changes its rotary embedding with the length \(dynamic\)"):
        GraphDecoder(moving)


def test_too_long_an_answer_is_refused():
    model = tiny_model("llama")
    decoder = GraphDecoder(model)
    ids = torch.ones(1, 60, dtype=torch.long)
    with torch.inference_mode(), decoder.serving(torch.ones_like(ids), 2) as room:
        model(ids, past_key_values=room.cache)
        for _ in range(4):
            model(ids[:, :1], past_key_values=room.cache)
        with pytest.raises(MicrogliaError, match=r"up to 64 in all, but tokens of shape .* came after 64"):
            model(ids[:, :1], past_key_values=room.cache)
