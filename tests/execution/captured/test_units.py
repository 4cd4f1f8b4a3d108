"""Captured steps without channels and sublayers say what masked ones say; what is gone is not launched."""

import functools
import itertools
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model

from microglia.attach import attached
from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.execution import Captured, Request
from microglia.execution.captured.channels import MlpShape, channel_buckets
from microglia.execution.captured.parts import Part
from microglia.execution.captured.variants import Variant
from microglia.generation import generate
from microglia.units import Arrangement, ChannelGeometry
from tests.execution.captured.test_captured import Silent
from tests.tiny import Fixed, positions, pruner_of, tiny_model, tiny_prompts, tiny_tokenizer
from tests.units.many import KINDS, LAYERS, deep_model, shuffled, some

IDS, MASK = tiny_prompts(14, 9, 3)
TOKENS = tiny_prompts(5, 5, 5, seed=2)[0]
PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
ROWS = pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
UNITS = pytest.mark.parametrize("units", [("channel",), ("sublayer",), KINDS], ids="+".join)


@torch.inference_mode()
def logits(model, pruner, execution):
    """(B, 1 + N, V), of the prompts' last tokens and after each of the tokens that follow."""
    mask, fill = MASK, pruner.fill == "mean"
    with ExitStack() as stack:
        stack.enter_context(attached(model, pruner, execution))
        captured = isinstance(execution, Captured)
        cache = stack.enter_context(execution.prepared(Request(mask, 8, fill=fill))).cache if captured else None
        out = model(IDS, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, use_cache=True)
        after = [out.logits[:, -1].float()]
        for token in TOKENS.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            place = positions(mask)[:, -1:]
            out = model(token, attention_mask=mask, position_ids=place, past_key_values=out.past_key_values)
            after.append(out.logits[:, -1].float().clone())
    return torch.stack(after, 1)


def answer(model, pruner, execution):
    options = {"max_new_tokens": 10, "eos_token_id": None}
    return generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **options).tokens


def step_of(captured):
    (step,) = captured.steps.values()
    return step


@ROWS
@UNITS
@pytest.mark.parametrize("block", [1, 2])
def test_captured_is_masked(family, units, rows, block):
    model = deep_model(family)
    pruner, captured = some(model, rows, units), Captured(model, block=block, lowest=0.1)
    masked = logits(model, pruner, "masked")
    torch.testing.assert_close(logits(model, pruner, captured), masked, atol=3e-5, rtol=0)
    assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))
    shapes = {variant.mlp.kind for variant in step_of(captured).variants if variant.mlp is not None}
    assert ("shared" if rows == 1 else "rows") in shapes or units == ("sublayer",)


@ROWS
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "gpt2"])
def test_what_pruned_units_leave_behind(family, rows):
    model = deep_model(family)
    pruner, captured = some(model, rows, fill="mean"), Captured(model, block=2)
    masked = logits(model, pruner, "masked")
    torch.testing.assert_close(logits(model, pruner, captured), masked, atol=3e-5, rtol=0)
    assert (masked - logits(model, some(model, rows), "masked")).abs().max() > 1e-3


@ROWS
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2"])
def test_masked_steps_compute_everything_and_say_the_same(family, rows):
    model = deep_model(family)
    pruner, captured = some(model, rows), Captured(model, block=2)
    captured.apply = functools.partial(captured.apply, masked=True)
    torch.testing.assert_close(logits(model, pruner, captured), logits(model, pruner, "masked"), atol=3e-5, rtol=0)
    variants = step_of(captured).variants
    assert {variant.kind for variant in variants} <= {"dense", "masked"}
    assert not any(any(variant.gone) or (variant.mlp is not None and variant.mlp.is_cut) for variant in variants)


@ROWS
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_in_half_precision_the_error_is_the_masked_models(family, rows):
    exact, half = deep_model(family), deep_model(family, dtype=torch.bfloat16)
    truth = logits(exact, some(exact, rows), "masked")
    pruner = some(half, rows)
    ours, theirs = (
        (logits(half, pruner, execution) - truth).abs().mean() for execution in (Captured(half, block=2), "masked")
    )
    assert 0 < ours <= 2 * theirs


# --- what is launched -------------------------------------------------------------------------------------------------


def launched(step, part):
    """The operations of a captured piece, by their names."""
    views = {"view", "transpose", "slice", "unsqueeze", "select", "squeeze", "unflatten", "flatten", "to"}
    names = [function._schema.name.removeprefix("aten::") for function, *_ in step.pieces[part].calls]
    return [name for name in names if name not in views]


def test_what_is_gone_is_not_launched():
    """No projection, no keys and values, no norm; of a whole layer, nothing but that its input goes on."""
    model = deep_model("llama")
    keep = torch.ones(LAYERS, 2)
    keep[2], keep[3, 0], keep[4, 1] = -1, -1, -1
    arrangement = shuffled(model, protected=())
    pruner = some(model, 1, ("sublayer",), arrangement=arrangement)
    pruner.policy.logits = list(keep[:, None])
    captured = Captured(model, block=LAYERS, attention="products")
    masked = logits(model, pruner, "masked")
    torch.testing.assert_close(logits(model, pruner, captured), masked, atol=3e-5, rtol=0)
    step = step_of(captured)
    assert [part.layers for part in step.parts] == [range(i, i + 1) for i in range(LAYERS)]
    whole, _, nothing, mlp, attention = (launched(step, part) for part in step.parts)
    norm = ["pow", "mean", "add", "rsqrt", "mul", "mul"]
    assert nothing == ["copy_"]
    assert mlp == [*norm, "linear", "silu", "linear", "mul", "linear", "add", "copy_"]
    assert attention[:6] == norm
    assert [attention.count(name) for name in ("linear", "matmul", "index_copy_", "rsqrt", "silu")] == [4, 2, 2, 1, 0]
    assert whole == [*attention[:-1], *mlp]


def test_a_compact_mlp_reads_its_bucket():
    model = tiny_model("phi3")
    every = channel_buckets(64, 8, 0.25)
    assert every == (64, 56, 48, 40, 32, 24, 16)
    for kept, size in ((63, 64), (56, 56), (50, 56), (33, 40), (17, 24), (3, 16)):
        pruner = channels_of(model, kept)
        captured = Captured(model, block=1)
        assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))
        (shape,) = {variant.mlp for variant in step_of(captured).variants}
        assert shape == (MlpShape("shared", size) if size < 64 else MlpShape("masked", 64))
        modules = captured.model.mlps.weights[0].projections(size) if size < 64 else {}
        assert [tuple(m.weight.shape) for m in modules.values()] == ([(2 * size, 48), (48, size)] if modules else [])


def channels_of(model, *kept):
    """A pruner that keeps the first so many channels of every layer, a row for each number, in blocks of one."""
    arrangement = shuffled(model, block=1)
    logits = [torch.stack([torch.where(torch.arange(64) < n, 1.0, -1.0) for n in kept]) for _ in range(2)]
    policy = Fixed(logits)
    policy.signals = ()
    return pruner_of(policy, units=("channel",), arrangement=arrangement)


def test_buckets_are_whole_granules_an_eighth_apart():
    block = ChannelGeometry.divided(11008).block
    assert block == 64
    sizes = channel_buckets(11008, block, 0.5)
    assert sizes == (11008, 9664, 8256, 6912, 5504)
    assert channel_buckets(8192, 64, 0.25) == (8192, 7168, 6144, 5120, 4096, 3072, 2048)
    assert channel_buckets(64, 8, 1.0) == (64,)


# --- what is captured and copied --------------------------------------------------------------------------------------


def test_switching_units_captures_nothing_and_moves_nothing():
    """Also between pruners with other blocks and other orders, and back to heads alone."""
    model = deep_model("llama")
    captured = Captured(model, block=2)
    pruners = [
        some(model),
        some(model, 3),
        some(model, seed=8, arrangement=shuffled(model, seed=9, block=2)),
        some(model, seed=8, arrangement=Arrangement()),  # copied in longer runs, fewer in number
        some(model, 3, ("channel",), arrangement=shuffled(model, seed=11, block=4)),
        some(model, 1, ("head",)),
        some(model, 3, ("sublayer",)),
    ]

    def places():
        step = step_of(captured)
        tensors = [*step.edges, step.channels.slots, step.channels.kept, step.channels.gates, step.scales]
        tensors += [x for weights in captured.model.mlps.weights for x in weights.flat.values()]
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


def test_decisions_about_heads_reserve_nothing_for_mlps():
    model = deep_model("llama")
    captured = Captured(model)
    answer(model, some(model, 1, ("head",)), captured)
    assert "weights" not in vars(captured.model.mlps)
    assert step_of(captured).channels is None


def test_only_the_blocks_that_need_a_shape_are_captured_for_it():
    model = deep_model("llama")
    captured = Captured(model, block=1)
    pruner = some(model, 1, ("channel",))
    answer(model, pruner, captured)
    step = step_of(captured)
    dense = {part for part in step.pieces if part.variant.is_of_heads}
    assert set(step.pieces) - dense == {part for part in step.parts if not part.variant.is_of_heads}


@pytest.mark.parametrize("attention", ["stock", "products"])
def test_one_compiled_code_serves_all_layers(attention):
    """A shape costs one compilation, not one for each layer; and a half of a layer by itself is compiled as well."""
    counts = []
    for layers in (2, 4):
        torch.compiler.reset()
        graphs = []

        def backend(module, inputs, graphs=graphs):
            graphs.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
            return module.forward

        model = tiny_model("llama", num_hidden_layers=layers)
        compiler = functools.partial(torch.compile, backend=backend, dynamic=False)
        captured = Captured(model, block=1, compiled=compiler, attention=attention, capture=Silent())
        step, seen = captured.step_for(3, 64), [len(graphs)]
        pruner = some(model, 1, ("channel",), arrangement=shuffled(model))
        step._layout(pruner.sites(model))
        bucket = captured.model.buckets[1]
        own = [
            Variant("shared", bucket, MlpShape("shared", 40)),
            Variant("rows", bucket, MlpShape("rows", 40)),
            Variant("dense", captured.model.buckets[0], MlpShape("masked", 64), scaled=True),
            Variant("dense", captured.model.buckets[0], MlpShape("shared", 24), gone=(True, False)),
            Variant("shared", bucket, gone=(False, True)),
        ]
        with torch.inference_mode():
            for variant in own:
                step.prepare(variant)
                seen.append(len(graphs))
                step._capture([Part(block, variant) for block in captured.model.blocks])
                assert len(graphs) == seen[-1]
        counts.append([after - before for before, after in itertools.pairwise(seen)])
        assert any((40, 48) in part for part in graphs)
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
    assert counts[0] == [1] * len(own) or attention == "stock"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_cut_is_refused():
    model = tiny_model("llama")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)).eval()
    captured = Captured(adapted)
    with pytest.raises(MicrogliaError, match=r"mlp\.down_proj carries an adapter, .* merge it first"):
        answer(adapted, some(adapted, 1, ("channel",), arrangement=shuffled(adapted)), captured)
    merged = adapted.merge_and_unload()
    pruner = some(merged, 1, ("channel",), arrangement=shuffled(merged))
    assert answer(merged, pruner, "captured").equal(answer(merged, pruner, "masked"))


def test_layers_of_unequal_sizes_or_unknown_parts_are_refused(monkeypatch):
    model = deep_model("llama")
    pruner, captured = some(model, 1, ("channel", "sublayer")), Captured(model)
    sites = pruner.sites(model)
    object.__setattr__(sites[1], "geometry", ChannelGeometry(32, 8))
    with pytest.raises(UnsupportedModelError, match="the layers of this LlamaForCausalLM differ in their channels"):
        captured.check_sites(sites)
    family = captured.model.anatomy.family
    object.__setattr__(family, "steps", False)
    try:
        with pytest.raises(UnsupportedModelError, match="may be more than attention and MLP, so captured steps cannot"):
            captured.check_sites(sites[LAYERS:])
    finally:
        object.__setattr__(family, "steps", True)
