"""Fast steps say what the library says: greedy tokens in float32, logits within its error, whatever is left out."""

import functools
import importlib.util
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from microglia.attach import attached
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution import Decision, Fast, Request
from microglia.execution.cpu import code
from microglia.execution.cpu.team import Team
from microglia.generation import generate
from tests.tiny import positions, tiny_model, tiny_prompts, tiny_tokenizer, uneven, wild

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
PLAIN = {"max_new_tokens": 12, "eos_token_id": None}


def answer(model, pruner, execution, prompts=PROMPTS, **options):
    return generate(model, tiny_tokenizer(), prompts, pruner, execution=execution, **{**PLAIN, **options}).tokens


def logits_of(model, ids, mask, tokens, execution=None, pruner=None):
    """Logits (B, 1 + N, V) after the prompt and each of the given tokens (B, N)."""
    with ExitStack() as stack, torch.inference_mode():
        if pruner is not None:
            stack.enter_context(attached(model, pruner, execution or "masked"))
        cache = None
        if execution is not None:
            cache = stack.enter_context(execution.prepared(Request(mask, tokens.shape[1] + 1))).cache
        out = model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True)
        after, whole = [out.logits[:, -1]], mask
        for token in tokens.split(1, 1):
            whole = torch.cat([whole, torch.ones_like(token)], 1)
            options = {"attention_mask": whole, "position_ids": positions(whole)[:, -1:]}
            out = model(token, past_key_values=out.past_key_values, **options)
            after.append(out.logits[:, -1].clone())
    return torch.stack(after, 1)


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr("microglia.execution.cpu.request.thread_count", lambda: 3)


def check_logits(family, rows):
    """Within a few of float32's own errors of float64, each row read by itself; sliding windows (7) are passed."""
    model, truth = tiny_model(family), tiny_model(family, dtype=torch.float64, backend="eager")
    ids, mask = tiny_prompts(*[9, 6, 4, 9, 3, 8][:rows])
    tokens = torch.randint(2, 97, (rows, 9), generator=torch.Generator().manual_seed(5))
    alone = [(ids[i : i + 1, int(start) :], tokens[i : i + 1]) for i, start in enumerate((mask == 0).sum(1))]
    exact = torch.cat([logits_of(truth, row, torch.ones_like(row), new) for row, new in alone])
    ours = (logits_of(model, ids, mask, tokens, Fast(model)) - exact).abs().max()
    theirs = (logits_of(model, ids, mask, tokens) - exact).abs().max()
    assert ours <= 3 * theirs + 1e-5


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_logits_are_those_of_float64(family, rows):
    check_logits(family, rows)


@pytest.mark.parametrize("other", ["llama", "gemma2", "gpt2"])
def test_threads_share_a_step(other, three_threads):
    check_logits(other, 3)
    model = tiny_model(other)
    for pruner in (None, uneven(model), uneven(model, 3)):
        assert answer(model, pruner, "fast").equal(answer(model, pruner, "masked"))


MAKERS = [None, uneven, wild, functools.partial(uneven, rows=3)]


@pytest.mark.parametrize("make", MAKERS, ids=["dense", "shared", "wild", "own"])
def test_fast_is_masked(family, make):
    model = tiny_model(family)
    pruner = make and make(model)
    assert answer(model, pruner, Fast(model)).equal(answer(model, pruner, "masked"))


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3_text"])
def test_what_pruned_heads_leave_behind(family, rows):
    model = tiny_model(family)
    pruner = uneven(model, rows, fill="mean")
    assert answer(model, pruner, "fast").equal(answer(model, pruner, "masked"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
def test_in_half_precision_the_error_is_no_larger_than_the_librarys(dtype, rows):
    ids, mask = tiny_prompts(*[9, 6, 4][:rows])
    tokens = torch.randint(2, 97, (rows, 6), generator=torch.Generator().manual_seed(5))
    model = tiny_model("qwen2", dtype=dtype)
    truth = logits_of(tiny_model("qwen2", dtype=dtype).float(), ids, mask, tokens)
    ours = (logits_of(model, ids, mask, tokens, Fast(model)).float() - truth)[:, 1:].abs().mean()
    theirs = (logits_of(model, ids, mask, tokens).float() - truth)[:, 1:].abs().mean()
    assert 0 < ours <= theirs


def rounded(weight, bits):
    """Rounded to the nearest: 8 bits with a scale for each row, 4 with one for each 32 numbers."""
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    rows = []
    for row in weight:
        groups = []
        for group in row.split(32):
            scale = group[group.abs().argmax()] / -8
            groups.append((group / scale).round().clamp(-8, 7) * scale)
        rows.append(torch.cat(groups))
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_are_a_model_of_rounded_weights(bits):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    model, truth = (tiny_model("llama", **sizes) for _ in range(2))
    with torch.no_grad():
        for module in truth.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight, bits))
    ids, mask = tiny_prompts(9, 6)
    tokens = torch.randint(2, 97, (2, 5), generator=torch.Generator().manual_seed(5))
    steps = {}
    for name, lm, execution in (("ours", model, Fast(model, bits=bits)), ("rounded", truth, Fast(truth))):
        with torch.inference_mode(), execution.prepared(Request(mask, 6)) as prepared:
            truth(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=prepared.cache)
            if lm is model:  # the same prompt in both caches, read by the model of rounded weights
                execution.present.prompt_read()
            steps[name] = torch.stack([execution.present.step(token[:, 0]).clone() for token in tokens.split(1, 1)])
    torch.testing.assert_close(steps["ours"], steps["rounded"], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_small_inputs_are_left_out_for_each_token(family, rows):
    """As a model in which they are set to zero. Rows share the inputs that any of them needs: here equal ones."""
    model, truth = tiny_model(family), tiny_model(family)
    for one in (model, truth):  # sdpa of older transformers leaves out the softcap of Gemma 2
        one.set_attn_implementation("eager")
    ids, mask = tiny_prompts(9)
    tokens = torch.randint(2, 97, (1, 6), generator=torch.Generator().manual_seed(5))
    thresholds = [{"q": 0.3, "k": 0.5, "v": 0.4, "o": 0.2, "up": 0.6, "down": 0.1}, {"gate": 0.4, "down": 0.2}]
    if family == "gpt2":
        thresholds = [{"q": 0.3, "k": 0.3, "v": 0.3, "o": 0.2, "up": 0.6, "down": 0.1}, {"down": 0.2}]
    if family == "phi3":
        thresholds = [{"q": 0.3, "k": 0.3, "v": 0.3, "o": 0.2, "gate": 0.6, "up": 0.6, "down": 0.1}, {"down": 0.2}]
    fast = Fast(model, thresholds=thresholds)
    ours = logits_of(model, ids.repeat(rows, 1), mask.repeat(rows, 1), tokens.repeat(rows, 1), fast)
    out = truth(ids, use_cache=True)
    for layer, own in zip(fast.plan.computation.layers, thresholds, strict=True):
        for name, threshold in own.items():
            place = getattr(layer, name).module
            path = next(path for path, module in model.named_modules() if module is place)
            module = truth.get_submodule(path)
            if not module._forward_pre_hooks:
                module.register_forward_pre_hook(lambda _, x, least=threshold: (x[0] * (x[0].abs() > least),))
    after = []
    for token in tokens.split(1, 1):
        out = truth(token, past_key_values=out.past_key_values, use_cache=True)
        after.append(out.logits[:, -1])
    torch.testing.assert_close(ours[:, 1:], torch.stack(after, 1).expand(rows, -1, -1), atol=5e-5, rtol=1e-4)


def test_a_weight_that_lies_transposed_is_read_as_it_lies():
    model = tiny_model("llama")
    truth = answer(model, None, "fast")
    for layer in model.model.layers:
        for module in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
            module.weight.data = module.weight.data.T.contiguous().T
    fast = Fast(model)
    before = fast.extra_bytes
    assert answer(model, None, fast).equal(truth)
    assert answer(model, uneven(model), fast).equal(answer(model, uneven(model), "masked"))
    assert fast.extra_bytes == before


def test_weights_that_change_are_read_anew():
    model = tiny_model("llama")
    fast = Fast(model)
    first = answer(model, None, fast)
    up = [layer.mlp.up_proj for layer in model.model.layers]
    for change in (
        lambda: model.model.norm.weight.mul_(torch.linspace(-1, 2, 48)),  # which stands in our tables in float32
        lambda: setattr(up[0], "weight", torch.nn.Parameter(up[1].weight.clone())),  # which lies elsewhere
    ):
        with torch.no_grad():
            change()
        assert not answer(model, None, fast).equal(first)
        first = answer(model, None, fast)
        assert first.equal(answer(model, None, "masked"))


def test_an_answer_ends_with_its_end_token():
    model = tiny_model("llama")
    whole = answer(model, None, "masked", max_new_tokens=40)
    for end in ([int(whole[0, 4])], [int(whole[0, 2]), int(whole[1, 6]), int(whole[2, 9])]):
        options = {"max_new_tokens": 40, "eos_token_id": end}
        assert answer(model, None, "fast", **options).equal(answer(model, None, "masked", **options))


def test_sampling_and_streaming_are_the_librarys_own():
    model, answers, streamed = tiny_model("phi3"), [], []

    class Streamer:
        put = staticmethod(lambda tokens: streamed.append(tokens))
        end = staticmethod(lambda: streamed.append("end"))

    for execution in ("masked", "fast"):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": 0.7, "min_new_tokens": 3}
        answers.append(answer(model, wild(model), execution, **options))
    assert answers[0].equal(answers[1])
    alone = answer(model, uneven(model), "fast", prompts=PROMPTS[:1], streamer=Streamer())
    assert [int(tokens) for tokens in streamed[1:-1]] == alone[0].tolist()
    assert streamed[-1] == "end"


def test_the_model_comes_back(snapshot):
    model = tiny_model("phi3")
    before = snapshot(model)
    answer(model, wild(model, fill="mean"), "fast")
    assert snapshot(model) == before


def test_a_pruned_cache_is_smaller():
    model = tiny_model("qwen2")
    ids, mask = tiny_prompts(9)
    fast, sizes = Fast(model), []
    for pruner in (None, uneven(model)):
        with ExitStack() as stack, torch.inference_mode():
            if pruner is not None:
                stack.enter_context(attached(model, pruner, fast))
            cache = stack.enter_context(fast.prepared(Request(mask, 4))).cache
            model(ids, past_key_values=cache, use_cache=True)
            sizes.append([layer.keys.shape[1] for layer in cache.layers])
    assert sizes == [[4, 4], [3, 2]]


def test_all_that_the_code_is_made_of_is_in_its_fingerprint():
    """Else an edit would run the code of before it, out of numba's cache."""
    folder, seen, todo = Path(code.__file__).parent, set(), ["step", "multiply"]
    while todo:
        seen.add(name := todo.pop())
        text = (folder / f"{name}.py").read_text()
        found = re.findall(r"microglia\.execution\.cpu(?:\.(\w+) import| import (\w+))", text)
        todo += [one for pair in found for one in pair if one and one not in seen]
    assert seen == {*code.SOURCES}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_fast_step_cannot_follow_is_refused(monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="beams and several answers to a prompt move rows of the cache of fast steps"):
        answer(model, uneven(model), "fast", num_beams=2)
    with pytest.raises(ConfigError, match="fast steps show neither attention weights nor hidden states"):
        answer(model, None, "fast", output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="bits=3 was given; choose 4 or 8"):
        Fast(model, bits=3)
    with pytest.raises(MicrogliaError, match="the prompt was not read into the cache of this fast execution"):
        Fast(model).apply([], Decision([]), cache=None).__enter__()
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="has a forward pass of its own, in peft"):
        Fast(adapted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"needs numba, .* install microglia\[cpu\] or use execution='comp"):
        Fast(model)


def test_a_model_that_is_more_than_its_family_is_refused():
    model = tiny_model("llama")
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp of this LlamaForCausalLM is hooked"):
        Fast(model)
    hook.remove()
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="knows no activation"):
        Fast(model)


def test_too_long_an_answer_and_padding_on_the_right_are_refused():
    model, ids = tiny_model("llama"), torch.ones(1, 6, dtype=torch.long)
    fast = Fast(model)
    with torch.inference_mode(), fast.prepared(Request(torch.ones_like(ids), 1)) as prepared:
        model(ids, past_key_values=prepared.cache)
        model(ids[:, :1], past_key_values=prepared.cache)
        with pytest.raises(MicrogliaError, match=r"up to 7 in all, but tokens of shape .* came after 7"):
            model(ids[:, :1], past_key_values=prepared.cache)
    with pytest.raises(MicrogliaError, match="padding elsewhere than on its left"):
        fast.prepared(Request(torch.tensor([[1, 1, 0]]), 1)).__enter__()


def test_an_error_in_a_thread_reaches_who_asked():
    def task(thread):
        if thread == 1:
            raise ValueError("one of us")
        return thread

    team = Team()
    with pytest.raises(ValueError, match="one of us"):
        team.run(task, 3)
    assert team.run(lambda thread: thread, 3) == 0
