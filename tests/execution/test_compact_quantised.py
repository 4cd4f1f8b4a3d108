"""Weights that torchao quantised are cut as they are: masked is compacted, and nothing is rounded a second time.

torchao is the extra `quant`; importing it prints warnings, so the development environment does without and CI adds it
for this file.
"""

import pytest
import torch

from microglia.attach import attached, gated
from microglia.compact import compacted
from microglia.errors import MicrogliaError
from microglia.gate import Gate
from microglia.replay import GraphDecoder
from microglia.sites import find_sites
from tests.tiny import step_logits, tiny_model, tiny_prompts, uneven_policy

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed; pip install microglia[quant]"
)
Intx, PerAxis, PerGroup = (getattr(quantization, name) for name in ("IntxWeightOnlyConfig", "PerAxis", "PerGroup"))

IDS, MASK = tiny_prompts(9, 4, 6)
ANSWER = tiny_prompts(4, 4, 4, seed=2)[0]
ONE = Gate(bucket=1)


def pruned(model, pruning, rows, **options):
    with attached(model, uneven_policy(model, rows), gate=ONE, pruning=pruning, **options):
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
def test_quantised_masked_is_quantised_compacted_without_rounding_again(family, rows, config, fill, snapshot):
    model = tiny_model(family)
    quantization.quantize_(model.model, config)
    kind = type(find_sites(model)[0].output.weight.data)
    masked, compact = pruned(model, gated, rows, fill=fill), pruned(model, compacted, rows, fill=fill)
    torch.testing.assert_close(compact, masked, atol=1e-5, rtol=0)
    with attached(model, uneven_policy(model, 1), gate=ONE, pruning=compacted):
        step_logits(model, IDS, MASK, ANSWER)
        inside = find_sites(model)[0].output.weight
        assert type(inside.data) is kind
        assert inside.shape[1] < inside.shape[0]


def test_a_group_of_scales_wider_than_a_head_is_refused():
    model = tiny_model("llama")
    quantization.quantize_(model.model, Intx(torch.int4, PerGroup(16)))
    with pytest.raises(MicrogliaError, match="o_proj is quantised with one scale for every 16 inputs, which"):
        pruned(model, compacted, 1)


def test_captured_steps_send_quantised_weights_to_another_path():
    model = tiny_model("llama")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(MicrogliaError, match=r"q_proj stores .*; captured steps follow float weights only, use path="):
        GraphDecoder(model)
