"""Compaction of models that others have wrapped: LoRA adapters, offloaded weights, quantised weights."""

import accelerate
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from microglia.attach import attached
from microglia.errors import MicrogliaError
from microglia.units import find_sites
from tests.tiny import step_logits, tiny_model, tiny_prompts, uneven

IDS, MASK = tiny_prompts(9, 4, 6)
ANSWER = tiny_prompts(4, 4, 4, seed=2)[0]
KINDS = pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])


def pruned(model, execution, rows, **parts):
    with attached(model, uneven(model, rows, **parts), execution):
        return step_logits(model, IDS, MASK, ANSWER)


def with_lora(family, **options):
    base = tiny_model(family)
    names = find_sites(base)[0].layer.family.attention.projections
    fan = family == "gpt2"  # Conv1D keeps its weights as (in, out)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=list(names), fan_in_fan_out=fan, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


@KINDS
@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_lora_masked_is_lora_compact_and_restored(family, rows, fill, snapshot):
    model = with_lora(family)
    before = snapshot(model)
    masked, compact = pruned(model, "masked", rows, fill=fill), pruned(model, "compact", rows, fill=fill)
    torch.testing.assert_close(compact, masked, atol=1e-5, rtol=0)
    assert snapshot(model) == before
    with model.disable_adapter():
        plain = pruned(model, "compact", rows, fill=fill)
        torch.testing.assert_close(plain, pruned(model, "masked", rows, fill=fill), atol=1e-5, rtol=0)
    assert (plain - compact).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_merged_adapter_is_not_added_twice(family):
    model = with_lora(family)
    truth = pruned(model, "masked", 1)
    model.merge_adapter()
    torch.testing.assert_close(pruned(model, "compact", 1), truth, atol=1e-5, rtol=0)


def test_two_active_adapters_are_both_in_the_slice():
    model = with_lora("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(pruned(model, "compact", 1), pruned(model, "masked", 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_more_than_lora_are_refused(options):
    with pytest.raises(
        MicrogliaError, match=r"self_attn\.q_proj has the adapter 'default', which is more than plain LoRA"
    ):
        pruned(with_lora("llama", **options), "compact", 1)


def test_other_adapters_are_refused():
    config = IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"])
    with pytest.raises(MicrogliaError, match=r"self_attn\.k_proj is adapted by peft.tuners.ia3.*merge_and_unload"):
        pruned(get_peft_model(tiny_model("llama"), config), "compact", 1)


@KINDS
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_offloaded_masked_is_offloaded_compact_and_restored(family, rows, fill, snapshot):
    truth = pruned(tiny_model(family), "masked", rows, fill=fill)
    model = accelerate.cpu_offload(tiny_model(family), execution_device="cpu")
    before = snapshot(model)
    assert find_sites(model)[0].output.weight.is_meta
    for execution in ("masked", "compact"):
        torch.testing.assert_close(pruned(model, execution, rows, fill=fill), truth, atol=1e-5, rtol=0)
    assert snapshot(model) == before


class Packed(nn.Module):
    """A linear layer whose weight is int8 with a scale per row, as quantisers store it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


class Opaque(torch.Tensor):
    """A float tensor with a class of its own, as torchao's are."""


def test_quantised_weights_are_refused_where_they_would_be_cut_and_work_elsewhere(snapshot):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj = Packed(layer.self_attn.k_proj)
    before = snapshot(model)
    with pytest.raises(MicrogliaError, match=r"layers\.0\.self_attn\.k_proj stores its weight as Tensor of torch.int8"):
        pruned(model, "compact", 1)
    assert snapshot(model) == before
    torch.testing.assert_close(pruned(model, "compact", 3), pruned(model, "masked", 3), atol=1e-5, rtol=0)


def test_weights_of_a_class_of_their_own_are_refused():
    model = tiny_model("llama")
    projection = model.model.layers[0].self_attn.v_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Opaque))
    sentence = r"v_proj stores its weight as Opaque of torch.float32.*execution='masked'"
    with pytest.raises(MicrogliaError, match=sentence):
        pruned(model, "compact", 1)
