"""Weights that torchao quantised are cut as they are: masked is compact, and nothing is rounded a second time.

torchao is the extra `quant`; importing it prints warnings, so the development environment does without and CI adds it
for this file.
"""

import pytest
import torch

from microglia.attach import attached
from microglia.errors import MicrogliaError
from microglia.execution import Captured
from microglia.units import Arrangement, find_sites
from tests.tiny import step_logits, tiny_model, tiny_prompts, uneven
from tests.units.many import deep_model, some

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed; pip install microglia[quant]"
)
Intx, PerAxis, PerGroup = (getattr(quantization, name) for name in ("IntxWeightOnlyConfig", "PerAxis", "PerGroup"))

IDS, MASK = tiny_prompts(9, 4, 6)
ANSWER = tiny_prompts(4, 4, 4, seed=2)[0]


def pruned(model, execution, rows, **parts):
    with attached(model, uneven(model, rows, **parts), execution):
        return step_logits(model, IDS, MASK, ANSWER)


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "config",
    [
        quantization.Int8WeightOnlyConfig(),
        Intx(torch.int4, PerGroup(2)),
        Intx(torch.int8, PerAxis(0)),
    ],
    ids=["int8", "int4", "int8-affine"],
)
@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_quantised_masked_is_quantised_compact_without_rounding_again(family, rows, config, fill, snapshot):
    model = tiny_model(family)
    quantization.quantize_(model.model, config)
    kind = type(find_sites(model)[0].output.weight.data)
    masked, compact = pruned(model, "masked", rows, fill=fill), pruned(model, "compact", rows, fill=fill)
    torch.testing.assert_close(compact, masked, atol=1e-5, rtol=0)
    with attached(model, uneven(model, 1), "compact"):
        step_logits(model, IDS, MASK, ANSWER)
        inside = find_sites(model)[0].output.weight
        assert type(inside.data) is kind
        assert inside.shape[1] < inside.shape[0]


def test_a_group_of_scales_wider_than_a_head_is_refused():
    model = tiny_model("llama")
    quantization.quantize_(model.model, Intx(torch.int4, PerGroup(16)))
    with pytest.raises(MicrogliaError, match="o_proj is quantised with one scale for every 16 inputs, which"):
        pruned(model, "compact", 1)


def test_captured_steps_send_quantised_weights_to_another_execution():
    model = tiny_model("llama")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    sentence = r"q_proj stores .*; captured steps follow float weights only, use execution="
    with pytest.raises(MicrogliaError, match=sentence):
        Captured(model)


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("config", [quantization.Int8WeightOnlyConfig(), Intx(torch.int4, PerGroup(2))], ids=["8", "4"])
def test_quantised_channels_are_cut_without_rounding_again(family, rows, config):
    """Their order keeps the runs that share a scale together; one that does not is refused."""
    model = deep_model(family)
    quantization.quantize_(model.model, config)
    runs = torch.randperm(32, generator=torch.Generator().manual_seed(1))[:, None] * 2 + torch.arange(2)
    steps = {}
    for execution in ("masked", "compact"):
        with attached(model, some(model, rows, arrangement=Arrangement([runs.flatten()] * 5)), execution):
            steps[execution] = step_logits(model, IDS, MASK, ANSWER)
    torch.testing.assert_close(steps["compact"], steps["masked"], atol=3e-5, rtol=0)
    if isinstance(config, Intx):
        sentence = "down_proj is quantised with one scale for every 2 inputs, which runs of 1 that"
        with pytest.raises(MicrogliaError, match=sentence), attached(model, some(model, rows), "compact"):
            step_logits(model, IDS, MASK, ANSWER)
