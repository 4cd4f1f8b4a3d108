"""Views stay live and read-only; a replaced attention function belongs to one module and gone afterwards."""

from types import SimpleNamespace

import pytest
import torch

from microglia.anatomy import View, replaced_attention, stock_attention
from microglia.units import find_sites
from tests.tiny import BACKENDS, step_logits, tiny_model, tiny_prompts


def test_a_view_follows_its_object_except_in_what_it_changes():
    base = SimpleNamespace(a=1, b=2)
    view = View(base, b=3)
    base.a = 9
    assert (view.a, view.b, base.b) == (9, 3, 2)
    with pytest.raises(AttributeError, match="cannot set 'a' on a view; set it on the object itself"):
        view.a = 4
    with pytest.raises(AttributeError, match="no attribute 'c'"):
        _ = view.c


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_the_stock_function_called_by_hand_changes_nothing(family, backend):
    model = tiny_model(family, backend=backend)
    site, config = find_sites(model)[0], find_sites(model)[0].attention.config
    ids, mask = tiny_prompts(9, 4)
    answer, shapes = ids[:, -2:], []
    dense, stock = step_logits(model, ids, mask, answer), stock_attention(site.attention)

    def function(module, query, key, value, mask, **kwargs):
        shapes.append((query.shape[:3], key.shape[1]))
        return stock(module, query, key, value, mask, **kwargs)

    with replaced_attention(site.attention, function):
        assert step_logits(model, ids, mask, answer).equal(dense)
    assert site.attention.config is config
    assert shapes == [((2, 8, length), site.geometry.kv_heads) for length in (9, 1, 1)]
    step_logits(model, ids, mask, answer)
    assert len(shapes) == 3


def test_the_attention_comes_back_after_an_error():
    site = find_sites(tiny_model("phi3"))[0]
    config = site.attention.config
    with pytest.raises(ZeroDivisionError), replaced_attention(site.attention, torch.add):
        raise ZeroDivisionError
    assert site.attention.config is config
