"""Triton's kernels against torch: interpreted where there is no GPU, on it where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from microglia.execution import Captured, Decision
from microglia.execution.captured import kernels
from microglia.execution.captured.channels import MlpShape
from microglia.execution.captured.decode import by_kernel
from microglia.execution.captured.linear import of_one_row
from microglia.execution.captured.moves import Moves
from microglia.execution.captured.parts import Part
from microglia.units import Arrangement, find_sites
from tests.execution.captured.test_captured import answer
from tests.tiny import tiny_model, uneven

triton = pytest.importorskip("triton", reason="kernels need Triton")
CUDA = torch.cuda.is_available()


@pytest.mark.skipif(CUDA or os.environ.get("TRITON_INTERPRET") == "1", reason="runs by itself")
def test_interpreted():
    """Triton asks for the variable when a kernel is defined, so the tests below run in a process that has it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", __file__]
    subprocess.run(command, env=environment, check=True)


runs = pytest.mark.skipif(not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_interpreted")


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "size", "room", "position", "softcap"),
    [(2, 6, 6, 8, 130, 77, 0.0), (3, 8, 2, 96, 200, 199, 0.0), (1, 4, 4, 64, 64, 0, 3.0), (2, 6, 3, 80, 300, 150, 3.0)],
)
def test_attention_in_parts(batch, heads, groups, size, room, position, softcap, dtype):
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    torch.manual_seed(0)
    device = torch.device("cuda" if CUDA else "cpu")
    mask = torch.zeros(batch, 1, 1, room)
    mask[..., position + 1 :] = torch.finfo(dtype).min
    mask[0, ..., : position // 2] = torch.finfo(dtype).min
    keys, values = (torch.randn(groups, batch, room, size) for _ in range(2))
    queries, place = heads // groups, torch.tensor([position])
    mine = torch.stack([torch.randperm(2 * groups)[:groups] for _ in range(batch)])
    own = (mine[..., None] * queries + torch.arange(queries)).flatten(1)
    own[0, 0] = -1
    for own_heads, count in ((None, heads), (own, 2 * heads)):
        query = torch.randn(batch, count, 1, size)
        given = [x.to(device, dtype) for x in (query, keys, values, mask)]
        rest = place, own_heads, 0.3, softcap
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in rest]
        ours = by_kernel(*given, *moved).cpu().double()
        truth = plainly(*[x.cpu().double() for x in given], *rest)
        assert ours.shape == truth.shape == (batch, 1, count, size)
        assert (ours - truth).abs().max() <= {4: 1e-5, 2: 4e-3 if dtype == torch.float16 else 3e-2}[dtype.itemsize]


@runs
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 33), (1100, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_one_row(inputs, outputs, bias):
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    x, weight, b = torch.randn(1, 1, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x, weight, b = (t.to(device, dtype) for t in (x, weight, b))
    ours = of_one_row(x, weight, b if bias else None)
    truth = torch.nn.functional.linear(x.double(), weight.double(), b.double() if bias else None)
    torch.testing.assert_close(ours.double(), truth, atol=1e-3, rtol=1e-2 if CUDA else 1e-5)


def plainly(query, keys, values, mask, position, own, scale, softcap):
    """The same, row by row and head by head."""
    output = torch.zeros(query.shape[0], 1, query.shape[1], query.shape[3], dtype=query.dtype)
    for row in range(len(query)):
        heads = range(query.shape[1]) if own is None else own[row].tolist()
        for slot, head in enumerate(heads):
            group = slot // (len(heads) // len(keys))
            if head >= 0:
                scores = keys[group, row] @ query[row, head, 0] * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                output[row, 0, head] = (scores + mask[row, 0, 0]).softmax(-1) @ values[group, row]
    return output


@pytest.mark.skipif(CUDA or os.environ.get("TRITON_INTERPRET") == "1", reason="about what is made where no kernel runs")
def test_without_a_kernel_the_same_is_made_of_products():
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 8, 1, 6), torch.randn(3, 2, 9, 6), torch.randn(3, 2, 9, 6)
    mask, place = torch.zeros(2, 1, 1, 9), torch.tensor([8])
    own = torch.tensor([[0, 1, 4, -1, 6, 7], [2, 3, -1, 5, 7, -1]])
    torch.testing.assert_close(
        by_kernel(query, keys, values, mask, place, own, 0.3, 0.0),
        plainly(query, keys, values, mask, place, own, 0.3, 0.0),
    )


@runs
@pytest.mark.parametrize("kind", ["shared", "rows"])
@pytest.mark.parametrize(("family", "dtype"), [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("phi3", torch.float32), ("gpt2", torch.float32),
    ("qwen2", torch.bfloat16), ("gemma2", torch.float16),
])  # fmt: skip
def test_one_launch_makes_the_copies_of_a_switch(family, dtype, kind, monkeypatch):
    model, device = tiny_model(family, dtype=dtype), "cuda" if CUDA else "cpu"
    model.to(device)
    states = []
    for by_one in (True, False):
        with monkeypatch.context() as patch:
            if not by_one:
                patch.setattr(kernels, "usable", lambda device: False)
            captured = Captured(model, block=2, lowest=0.1, attention="products")
            step = captured.step_for(3, 64)
            generator = torch.Generator().manual_seed(1)
            for layer in step.cache.layers:
                for x in layer.stored:
                    x.copy_(torch.randn(x.shape, generator=generator))
            keep = (torch.rand(2, 3, 8, generator=generator) < 0.6).float()
            keep[..., 5], keep[..., 2:4] = 1, 0
            keep = keep[:, :1].expand(-1, 3, -1) if kind == "shared" else keep
            (variant,) = step.decision.variants(keep, captured.model.blocks)
            assert variant.kind == kind
            part = Part(captured.model.blocks[0], variant)
            with torch.inference_mode():
                step.prepare(variant)
                step.decision.place([part], keep)
                step.switches[part].replay()
            assert (step.moves[part] is not None) == by_one
        caches = [x.clone() for layer in step.cache.layers for x in layer.stored]
        weights = [x.clone() for weights in captured.model.weights for x in weights.flat.values()]
        states.append([*caches, *weights, step.decision.own.clone()])
    for ours, truth in zip(*states, strict=True):
        assert ours.equal(truth)


@runs
@pytest.mark.parametrize(("family", "dtype"), [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("phi3", torch.bfloat16), ("gpt2", torch.float32),
])  # fmt: skip
def test_one_launch_copies_channels(family, dtype, monkeypatch):
    model = tiny_model(family, dtype=dtype, intermediate_size=512, n_inner=512)
    model.to("cuda" if CUDA else "cpu")
    sites = find_sites(model, ("channel",), Arrangement(block=32))
    keep, states, made = torch.ones(2, 1, 16), [], []
    keep[0, 0, [1, 2, 7, 9, 15]], keep[1, 0, [0, 3]] = 0, 0
    plain = Moves.make
    monkeypatch.setattr(Moves, "make", lambda moves: made.append(plain(moves)))
    for by_one in (True, False):
        with monkeypatch.context() as patch:
            if not by_one:
                patch.setattr(kernels, "usable", lambda device: False)
            captured = Captured(model, block=2, attention="products")
            step = captured.step_for(1, 64)
            step.decide(Decision(list(keep.to(model.device))), sites)
            assert step.variants[0].mlp == MlpShape("shared", 448)
            assert bool(made) == by_one
            made.clear()
        states.append([x.clone() for weights in captured.model.mlps.weights for x in weights.flat.values()])
    for ours, truth in zip(*states, strict=True):
        assert ours.any()
        assert ours.equal(truth)


@runs
@pytest.mark.parametrize(("family", "rows"), [("phi3", 1), ("llama", 2)])
def test_with_kernels_captured_is_masked(family, rows):
    model = tiny_model(family).to("cuda" if CUDA else "cpu")
    captured = Captured(model, block=1, lowest=0.1, attention="kernel")
    options = {"max_new_tokens": 3, "prompts": ["7*8-2=", "a"]}
    assert answer(model, uneven(model, rows), captured, **options).equal(
        answer(model, uneven(model, rows), "masked", **options)
    )
