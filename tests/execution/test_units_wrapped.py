"""All kinds of units in models that others have wrapped: masked is compact, and the model comes back."""

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from microglia.attach import attached
from tests.tiny import step_logits, tiny_prompts
from tests.units.many import KINDS, deep_model, some

IDS, MASK = tiny_prompts(9, 4, 6)
ANSWER = tiny_prompts(4, 4, 4, seed=2)[0]
ROWS = pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])


def pruned(model, execution, rows, **parts):
    with attached(model, some(model, rows, KINDS, **parts), execution):
        return step_logits(model, IDS, MASK, ANSWER)


@ROWS
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_lora_masked_is_lora_compact_and_restored(family, rows, snapshot):
    base = deep_model(family)
    layer = some(base).sites(base)[0].layer
    names = [*layer.family.attention.projections, *layer.family.mlp.projections]
    model = get_peft_model(base, LoraConfig(r=3, target_modules=names, fan_in_fan_out=family == "gpt2")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    before = snapshot(model)
    for fill in ("zero", "mean"):
        masked, compact = (pruned(model, execution, rows, fill=fill) for execution in ("masked", "compact"))
        torch.testing.assert_close(compact, masked, atol=3e-5, rtol=0)
    assert snapshot(model) == before


@ROWS
def test_offloaded_masked_is_offloaded_compact_and_restored(rows, snapshot):
    truth = pruned(deep_model("phi3"), "masked", rows)
    model = accelerate.cpu_offload(deep_model("phi3"), execution_device="cpu")
    before = snapshot(model)
    for execution in ("masked", "compact"):
        torch.testing.assert_close(pruned(model, execution, rows), truth, atol=3e-5, rtol=0)
    assert snapshot(model) == before
