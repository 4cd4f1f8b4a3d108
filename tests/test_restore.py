"""Leaving the context restores the dense model: tensors, hooks, config and outputs, whatever happened inside."""

import pytest
import torch

from microglia.attach import attached
from tests.tiny import step_logits, tiny_model, tiny_prompts, uneven

IDS, MASK = tiny_prompts(9, 4, 6)


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_leaving_restores_everything(family, execution, rows, fill, snapshot):
    model = tiny_model(family)
    before = snapshot(model)
    with attached(model, uneven(model, rows, fill=fill), execution):
        step_logits(model, IDS, MASK, IDS[:, -2:])
        inside = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        assert sum(inside) > 0
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["before", "reading", "answering", "mlp"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_errors_restore_everything(error, where, rows, snapshot):
    """Raised before anything was read, after the prompt, while answering, and from inside a forward pass."""
    model = tiny_model("phi3")
    before = snapshot(model)

    def fail(*args):
        raise error

    def use():
        with attached(model, uneven(model, rows), "compact"):
            if where == "before":
                fail()
            model(IDS, attention_mask=MASK, use_cache=True)
            if where == "reading":
                fail()
            step_logits(model, IDS, MASK, IDS[:, -2:])
            fail()

    handle = model.model.layers[0].mlp.register_forward_hook(fail) if where == "mlp" else None
    with pytest.raises(error) as caught:
        use()
    assert caught.tb is not None  # held on purpose: what restores the model must not be the garbage collector
    if handle is not None:
        handle.remove()
    assert snapshot(model) == before


def test_a_pruning_that_fails_half_way_is_undone(snapshot):
    """The second site of this batch cannot be cut: the first one is dense again."""
    model = tiny_model("llama")
    before = snapshot(model)
    with (
        pytest.raises(Exception, match="use_cache=True"),
        attached(model, uneven(model, 3), "compact"),
    ):
        model(IDS, use_cache=False)
    assert snapshot(model) == before


def test_a_model_in_training_mode_with_gradients_keeps_both(snapshot):
    model = tiny_model("qwen2").train()
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)
    with attached(model, uneven(model), "compact"):
        step_logits(model, IDS, MASK, IDS[:, -2:])
    assert snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch.is_grad_enabled()
