"""FLOPs and bytes by counting, against torch's own counter and against tensors that are really there."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from microglia.anatomy import Anatomy, HeadGeometry
from microglia.anatomy.projection import tensor_bytes
from microglia.benchmark.costs import costs, kept_kv_bytes, prefill_flops, step_flops, weight_bytes
from microglia.benchmark.pattern import counts_at, random_keep
from microglia.execution import Compact, Decision
from microglia.gate import Gate, keep_ratio
from microglia.units import find_sites
from microglia.units.kv import kv_bytes
from tests.tiny import FAMILIES, tiny_model

CONTEXT = 6  # below the tiny models' sliding window


def read(model, rows=1, context=CONTEXT):
    """Sites, and the cache after a prompt."""
    ids = torch.randint(2, 97, (rows, context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return find_sites(model), ids, model(ids, use_cache=True).past_key_values


def patterns(sites, ratio, rows=1):
    return random_keep([site.geometry for site in sites], ratio, rows=rows, seed=1)


def counted(work) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def rotations(sites, positions: int) -> set[int]:
    """Operations for rotary angles, frequencies times positions: some versions of transformers let torch count them."""
    return {0, positions * sites[0].geometry.head_dim, 2 * positions * sites[0].geometry.head_dim}


@pytest.mark.parametrize("family", ["phi3", "qwen2", "gpt2"])
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_operations_of_a_step_are_those_that_torch_counts(family: str, ratio: float | None) -> None:
    # eager attention is two plain products, which the counter sees, unlike sdpa's on a CPU
    model = tiny_model(family, attn_implementation="eager")
    sites, ids, cache = read(model)
    keep = patterns(sites, ratio) if ratio else None
    analytical = step_flops(Anatomy(model), *((sites, keep) if keep else ()), batch=1, context=CONTEXT)
    if keep is None:
        found = counted(lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True))
    else:
        with torch.inference_mode(), Compact().apply(sites, Decision(keep), cache):
            found = counted(lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True))
    assert found - analytical in rotations(sites, positions=1)


def test_operations_of_a_prefill_are_those_that_torch_counts_and_the_causal_half_of_attention() -> None:
    model = tiny_model("phi3")
    sites, ids, _ = read(model, rows=2)
    linear = counted(lambda: model(ids, use_cache=True, logits_to_keep=1))  # sdpa: no operations on a CPU
    seen = sum(range(1, CONTEXT + 1))
    attention = 2 * sum(2 * 2 * site.geometry.width * seen for site in sites)
    total = prefill_flops(Anatomy(model), batch=2, context=CONTEXT)
    assert linear + attention - total in rotations(sites, positions=CONTEXT)


def test_a_sliding_window_caps_the_prefill() -> None:
    models = [tiny_model("mistral", sliding_window=window) for window in (None, 7)]
    sites = find_sites(models[0])
    full, capped = (prefill_flops(Anatomy(model), batch=1, context=20) for model in models)
    seen = sum(range(1, 21)) - (sum(range(1, 8)) + 13 * 7)
    assert full - capped == 4 * seen * sum(site.geometry.width for site in sites)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25])
def test_bytes_after_compaction_are_those_of_the_tensors_in_use(family: str, ratio: float) -> None:
    model = tiny_model(family)
    sites, _, cache = read(model)
    keep = patterns(sites, ratio)
    weights, kv = weight_bytes(model, sites, keep), kept_kv_bytes(cache, sites, keep)
    assert weights < weight_bytes(model)
    with torch.inference_mode(), Compact().apply(sites, Decision(keep), cache):
        assert weights == weight_bytes(model)
        assert kv == kv_bytes(cache)


def test_weights_of_a_step_are_all_but_the_lines_of_the_embedding_that_are_not_read() -> None:
    model = tiny_model("phi3")
    table = model.model.embed_tokens.weight
    every = sum(p.numel() * 4 for p in model.parameters())
    assert weight_bytes(model, rows=3) == every - (len(table) - 3) * table.shape[1] * 4
    tied = tiny_model("qwen2", tie_word_embeddings=True)
    assert weight_bytes(tied) == sum(p.numel() * 4 for p in tied.parameters())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_kv_bytes_go_down_by_exactly_the_pruned_share(rows: int, ratio: float) -> None:
    model = tiny_model("llama")  # multi-head attention
    sites, _, cache = read(model, rows=3)
    keep = patterns(sites, ratio, rows)
    assert keep_ratio(keep).tolist() == [ratio] * rows
    dense = kv_bytes(cache)
    with torch.inference_mode(), Compact().apply(sites, Decision(keep), cache):
        assert kv_bytes(cache) == dense * ratio


def test_rows_that_decide_for_themselves_still_read_every_weight() -> None:
    model = tiny_model("llama")
    sites, _, cache = read(model, rows=3)
    keep = patterns(sites, 0.5, rows=3)
    assert weight_bytes(model, sites, keep, rows=3) == weight_bytes(model, rows=3)
    assert kept_kv_bytes(cache, sites, keep) == kv_bytes(cache) // 2


def test_a_sliding_window_caps_the_step_and_pruning_saves_within_it() -> None:
    model = tiny_model("gemma3_text")  # a sliding layer of 7 keys and a full one
    sites, _, cache = read(model, context=20)
    keep = patterns(sites, 0.5)
    dense = costs(model, cache, batch=1, context=20)
    kept = costs(model, cache, batch=1, context=20, sites=sites, keep=keep)
    projections = sum(site.saved_flops(k) for site, k in zip(sites, keep, strict=True))
    width = sites[0].geometry.width
    assert dense.step_flops - kept.step_flops == projections + 4 * (7 + 21) * width // 2
    assert dense.bytes - kept.bytes == sum(s.saved_bytes(k) for s, k in zip(sites, keep, strict=True)) + (
        kv_bytes(cache) - kept_kv_bytes(cache, sites, keep)
    )
    assert dense.prefill_flops == kept.prefill_flops


@pytest.mark.parametrize(
    ("geometry", "ratio", "counts"),
    [
        (HeadGeometry(32, 32, 96), 0.75, (24, 1)),
        (HeadGeometry(32, 8, 128), 0.75, (6, 4)),  # whole groups rather than queries of each: their cache goes too
        (HeadGeometry(16, 2, 128), 0.75, (2, 6)),
        (HeadGeometry(16, 2, 128), 0.5, (1, 8)),
        (HeadGeometry(8, 4, 6), 1.0, (4, 2)),
        (HeadGeometry(8, 8, 6), 0.01, (1, 1)),
    ],
)
def test_a_ratio_becomes_the_rectangle_with_the_fewest_groups(geometry, ratio, counts) -> None:
    assert counts_at(geometry, ratio) == counts


def test_patterns_are_rectangles_that_the_gate_leaves_as_they_are() -> None:
    for family in ("llama", "qwen2"):
        for site, keep in zip(sites := find_sites(tiny_model(family)), patterns(sites, 0.5, rows=5), strict=True):
            assert torch.equal(Gate(bucket=1)(keep * 2 - 1, site.geometry), keep)
            assert site.attended_width(keep) == keep[0].sum() * site.geometry.head_dim
            assert site.kv_share(keep) <= 1


def test_a_quantised_tensor_counts_what_it_stores() -> None:
    class Packed:
        codes, scale = torch.zeros(8, dtype=torch.int8), torch.zeros(2)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    assert tensor_bytes(Packed()) == 8 + 8
