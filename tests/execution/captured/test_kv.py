"""The static cache: what a level uses is one contiguous piece, and no step copies it."""

import contextlib
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from microglia.anatomy import HeadGeometry
from microglia.execution import Captured
from microglia.execution.captured.kv import Place, StaticKV
from microglia.execution.captured.variants import Variant
from tests.tiny import tiny_model


def test_a_level_is_one_contiguous_piece_from_the_start():
    geometry = HeadGeometry(8, 4, 6)
    kv = StaticKV(geometry, 3, 64, Place(torch.zeros(1)), dtype=torch.float32, device=torch.device("cpu"))
    assert kv.keys.shape == kv.values.shape == (3, 4, 64, 6)
    for groups in (4, 3, 1):
        for part, whole in zip(kv.first(groups), (kv.keys, kv.values), strict=True):
            assert part.is_contiguous()
            assert part.data_ptr() == whole.data_ptr()
            assert part.shape == (groups, 3, 64, 6)


def made_in(graph, cache):
    """Sizes of the tensors that the operations of a tape made anew, views of the cache's memory left out."""
    held = {x.untyped_storage().data_ptr() for layer in cache.layers for x in layer.stored}
    made = [out for *_, out in graph.calls if isinstance(out, torch.Tensor)]
    return [out.numel() for out in made if out.untyped_storage().data_ptr() not in held]


@pytest.mark.parametrize("attention", ["stock", "products", "kernel"])
@pytest.mark.parametrize("kind", ["shared", "rows"])
def test_no_operation_of_a_step_copies_keys_or_values(kind, attention):
    model = tiny_model("llama", hidden_size=128)  # heads of 16: a group's scores are smaller than its keys
    captured = Captured(model, block=1, attention=attention)
    step = captured.step_for(3, 256)
    for bucket in captured.model.buckets[1:]:
        variant = Variant(kind, bucket)
        with torch.inference_mode():
            step.prepare(variant)
        level = step.cache.layers[0].first(bucket.groups)[0].numel()
        for (_, of), graph in step.pieces.items():
            if of == variant:
                assert max(made_in(graph, step.cache)) < level / 2


class Uncaptured:
    """Captures nothing: what is compiled runs, as it does not under a tape."""

    recording = staticmethod(contextlib.nullcontext)
    begin = end = replay = staticmethod(lambda: None)

    def graph(self):
        return self


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["products", "kernel"])
def test_compiled_code_copies_no_keys_or_values(attention, monkeypatch, tmp_path):
    """On a GPU one copy of every layer's keys and values made pruned steps slower than dense ones."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code from a cache would not be shown
    torch.compiler.reset()
    model = tiny_model("llama", hidden_size=128, num_hidden_layers=1)
    captured = Captured(model, block=1, compiled=True, attention=attention, capture=Uncaptured())
    step, bucket = captured.step_for(3, 256), captured.model.buckets[1]
    level = step.cache.layers[0].first(bucket.groups)[0].numel()
    for kind in ("shared", "rows"):
        with torch.inference_mode():
            _, codes = run_and_get_code(step.prepare, Variant(kind, bucket))
        made = [shape for code in codes for shape in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)]
        sizes = [torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() for shape in made]
        assert sizes
        assert max(sizes) < level / 2
