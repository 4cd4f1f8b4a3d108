"""Caches lose key/value heads for good, and every row may hold its own."""

from contextlib import ExitStack

import pytest
import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from microglia.errors import MicrogliaError
from microglia.units.kv import RowHeads, keep_kv_heads, kv_bytes, take_rows
from tests.tiny import tiny_model

KEYS = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
OWN = torch.tensor([[0, 3], [2, 1]])


def filled(family="llama", static=False):
    config = tiny_model(family).config
    cache = StaticCache(config=config, max_cache_len=12) if static else DynamicCache(config=config)
    for layer in range(2):
        cache.update(KEYS, -KEYS, layer)
    return cache


def test_take_rows_takes_each_rows_own():
    assert take_rows(KEYS, OWN).equal(torch.stack([KEYS[0, [0, 3]], KEYS[1, [2, 1]]]))


@pytest.mark.parametrize("static", [False, True])
def test_heads_that_all_rows_share_are_kept_in_one_layer_only(static):
    cache = filled(static=static)
    before = kv_bytes(cache)
    keep_kv_heads(ExitStack(), cache, 0, torch.tensor([1, 2]))
    assert cache.layers[0].keys[:, :, :5].equal(KEYS[:, [1, 2]])
    assert cache.layers[1].keys[:, :, :5].equal(KEYS)
    assert kv_bytes(cache) == before * 3 / 4
    keys, values = cache.update(NEW[:, [1, 2]], -NEW[:, [1, 2]], 0)
    assert keys[:, :, 5].equal(NEW[:, [1, 2], 0])
    assert values[:, :, 5].equal(-NEW[:, [1, 2], 0])


@pytest.mark.parametrize("static", [False, True])
def test_rows_keep_their_own_heads_and_cut_later_updates_too(static):
    cache = filled(static=static)
    before = kv_bytes(cache)
    keep_kv_heads(ExitStack(), cache, 1, OWN)
    assert kv_bytes(cache) == before * 3 / 4
    keys, values = cache.update(NEW, -NEW, 1)
    whole = torch.cat([KEYS, NEW], dim=2)
    assert keys[:, :, :6].equal(take_rows(whole, OWN))
    assert values[:, :, :6].equal(-take_rows(whole, OWN))
    assert int(cache.get_seq_length(1)) == 6


@pytest.mark.parametrize("static", [False, True])
def test_sliding_layers_slide_on(static):
    cache, whole = filled("mistral", static), filled("mistral", static)
    keep_kv_heads(ExitStack(), cache, 0, OWN)
    for step in range(6):
        new = NEW + step
        ours, _ = cache.update(new, -new, 0)
        truth, _ = whole.update(new, -new, 0)
        assert ours.equal(take_rows(truth, OWN))
    assert int(cache.get_seq_length(0)) == int(whole.get_seq_length(0)) == 11


def test_beams_can_be_reordered():
    cache = filled()
    keep_kv_heads(ExitStack(), cache, 0, torch.tensor([[0, 3], [0, 3]]))  # beams of one prompt share its decision
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].keys.equal(KEYS[1:, [0, 3]].expand(2, -1, -1, -1))


def test_the_library_does_not_take_our_layers_for_its_own():
    keep_kv_heads(ExitStack(), filled(), 0, OWN)
    registers = [x for name, x in vars(cache_utils).items() if name.endswith("LAYER_TYPE_MAPPING")]
    assert registers or not hasattr(cache_utils.CacheLayerMixin, "_layer_type")
    assert not any(issubclass(kind, RowHeads) for register in registers for kind in register.values())


def test_a_layer_without_keys_is_refused():
    class Recurrent:
        pass

    cache = Cache(layers=[DynamicLayer()])
    cache.layers = [Recurrent()]
    with pytest.raises(MicrogliaError, match="layer 0 is a Recurrent, which may not hold every token"):
        keep_kv_heads(ExitStack(), cache, 0, OWN)


def test_a_quantised_cache_is_refused():
    class Quantised(DynamicLayer):
        """Holds only what is new in `keys`, as the library's quantised layers do."""

    cache = Cache(layers=[Quantised()])
    with pytest.raises(MicrogliaError, match="layer 0 is a Quantised, which may not hold every token"):
        keep_kv_heads(ExitStack(), cache, 0, OWN)


@pytest.mark.parametrize("index", [torch.tensor([1, 2]), OWN], ids=["shared", "rows"])
def test_a_static_cache_is_empty_and_whole_again_afterwards(index):
    cache = filled(static=True)
    entries = list(cache.layers)
    with ExitStack() as stack:
        keep_kv_heads(stack, cache, 0, index)
        assert cache.layers[0].keys.shape[1] == 2
    assert all(a is b for a, b in zip(cache.layers, entries, strict=True))
    assert int(cache.get_seq_length()) == 0
    for layer in range(2):
        keys, values = cache.update(KEYS, -KEYS, layer)
        assert keys[:, :, :5].equal(KEYS)
        assert values[:, :, :5].equal(-KEYS)
        assert keys[:, :, 5:].abs().max() == 0
    assert int(cache.get_seq_length()) == 5
