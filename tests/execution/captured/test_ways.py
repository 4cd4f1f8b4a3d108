"""The way of attention is chosen at every level, by what each takes there."""

import pytest
import torch

from microglia.execution import Captured
from microglia.execution.captured import step as steps
from microglia.execution.captured.buckets import Bucket
from microglia.execution.captured.variants import Variant
from microglia.execution.captured.ways import timed, worth_trying
from tests.execution.captured.test_captured import answer
from tests.tiny import tiny_model, uneven

CPU = torch.device("cpu")


@pytest.fixture
def clocked(monkeypatch):
    """Both ways are tried; products are the faster one where all groups are read, the model's own below."""
    asked = []

    def tried(attention, device, batch, bucket):
        asked.append((batch, bucket))
        return ("products", "stock")

    def slow(work, device):
        for part in work:
            part()
        products = len(asked_ways) % 2 == 0
        asked_ways.append(products)
        return float(products == (asked[-1][1].groups < 8))

    asked_ways = []
    monkeypatch.setattr(steps, "worth_trying", tried)
    monkeypatch.setattr(steps, "timed", slow)
    return asked


def test_the_choice_is_made_level_by_level(clocked):
    model = tiny_model("llama")
    captured = Captured(model, block=1)
    step = captured.step_for(3, 64)
    with torch.inference_mode():
        for variant in (
            Variant("shared", Bucket(6, 1)),
            Variant("rows", Bucket(4, 1)),
            Variant("masked", Bucket(8, 1)),
        ):
            step.prepare(variant)
    chosen = {(variant.kind, variant.bucket.groups): next(iter(ways)) for variant, ways in step.ways.items()}
    assert chosen == {
        ("dense", 8): "products",
        ("shared", 6): "stock",
        ("rows", 4): "stock",
        ("masked", 8): "products",
    }
    assert all(len(ways) == 2 for ways in step.ways.values())


def test_whatever_is_chosen_says_the_same(clocked):
    model = tiny_model("llama")
    for pruner in (uneven(model), uneven(model, 3)):
        captured = Captured(model, block=1, lowest=0.1)
        assert answer(model, pruner, captured).equal(answer(model, pruner, "masked"))


def test_a_way_that_fails_is_passed_over(monkeypatch):
    monkeypatch.setattr(steps, "worth_trying", lambda *_: ("unknown", "stock", "products"))
    model = tiny_model("llama")
    monkeypatch.setattr(steps.StepLayer, "attend", failing("unknown", steps.StepLayer.attend))
    captured = Captured(model)
    assert answer(model, uneven(model), captured).equal(answer(model, uneven(model), "masked"))
    (step,) = captured.steps.values()
    assert {frozenset(ways) for ways in step.ways.values()} == {frozenset({"stock", "products"})}
    assert step.failed == {"unknown": "RuntimeError: no such kernel"}


def test_the_last_way_may_not_fail_nor_time_be_over(monkeypatch):
    model = tiny_model("llama")
    step = Captured(model, block=1, attention="products").step_for(1, 64)
    variant = Variant("shared", Bucket(6, 1))
    for error in (RuntimeError, TimeoutError):
        with monkeypatch.context() as patch, torch.inference_mode():
            kinds = ("products",) if error is RuntimeError else ("products", "stock")
            patch.setattr(steps, "worth_trying", lambda *_, kinds=kinds: kinds)
            patch.setattr(steps.StepLayer, "attend", failing("products", steps.StepLayer.attend, error))
            with pytest.raises(error, match="no such kernel"):
                step.prepare(variant)
        assert all(part.variant != variant for part in step.pieces)
    with torch.inference_mode():
        step.prepare(variant)
    assert sum(part.variant == variant for part in step.pieces) == 2


def failing(way, plain, error=RuntimeError):
    def attend(layer, *args, **kwargs):
        if layer.way == way:
            raise error("no such kernel")
        return plain(layer, *args, **kwargs)

    return attend


def test_measuring_leaves_a_waiting_prompt_as_it_was(clocked):
    model = tiny_model("llama")
    step = Captured(model, block=1).step_for(1, 64)
    position = step.cache.place.position
    position.fill_(7)
    keys = [layer.stored[0].normal_().clone() for layer in step.cache.layers]
    with torch.inference_mode():
        step.prepare(Variant("shared", Bucket(6, 1)))
    assert position.tolist() == [7]
    for layer, before in zip(step.cache.layers, keys, strict=True):
        changed = (layer.stored[0] != before).any(-1).any(0).any(0)
        assert set(changed.nonzero().flatten().tolist()) <= {7, 63}  # places that steps write before they read them


def test_what_is_worth_trying():
    for kind in ("stock", "products", "kernel"):
        assert worth_trying(kind, CPU, 1, Bucket(8, 1)) == (kind,)
    assert worth_trying("auto", CPU, 1, Bucket(8, 1)) == ("stock",)
    assert timed([lambda: None], CPU) >= 0
