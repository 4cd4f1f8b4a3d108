"""What is seen of a prompt on whole models, against eager attention weights in float64."""

import pytest
import torch

from microglia.errors import ConfigError
from microglia.look import Look, watched
from microglia.sites import find_sites
from tests.reference import entropy_of, head_norms, sliding_windows
from tests.tiny import BACKENDS, positions, tiny_model, tiny_prompts

IDS, MASK = tiny_prompts(14, 9, 1)


def see(model, look, ids=IDS, mask=MASK, **options):
    with torch.no_grad(), watched(find_sites(model), mask.bool(), look, **options) as seen:
        model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    return seen


@pytest.mark.parametrize("window", [None, 4])
def test_entropy_is_that_of_the_eager_attention_weights(family, window):
    model = tiny_model(family, backend="eager")
    with torch.no_grad():
        weights = model(IDS, attention_mask=MASK, position_ids=positions(MASK), output_attentions=True).attentions
    seen = see(model, Look(window=window))
    for entry, truth, sliding in zip(seen, weights, sliding_windows(model.config), strict=True):
        expected = entropy_of(truth, MASK, window=window, sliding_window=sliding)
        torch.testing.assert_close(entry.signals["entropy"].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [name for name, backend in BACKENDS if backend == "sdpa"])
def test_sdpa_and_eager_see_the_same(family):
    model = tiny_model(family)
    look = see(model, Look())
    model.set_attn_implementation("eager")
    for sdpa, eager in zip(look, see(model, Look()), strict=True):
        for name in ("norm", "entropy"):
            torch.testing.assert_close(sdpa.signals[name], eager.signals[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_glances_are_finished_when_the_prompt_was_read(family, rows, monkeypatch):
    """On a GPU a site leaves a glance and the entropies of all sites are found at the end; the signals are the same."""
    model = tiny_model(family, backend="eager")
    truth = see(model, Look(), IDS[:rows], MASK[:rows])
    for name in ("microglia.look", "microglia.signals.entropy"):
        monkeypatch.setattr(f"{name}.by_kernel", lambda query, softcap: softcap is None)
    monkeypatch.setattr("microglia.signals.entropy.PART", 4)
    for entry, slow in zip(see(model, Look(), IDS[:rows], MASK[:rows]), truth, strict=True):
        torch.testing.assert_close(entry.signals["entropy"], slow.signals["entropy"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(family, side):
    model = tiny_model(family)
    ids, mask = (IDS[:2], MASK[:2]) if side == "left" else (IDS[:2].flip(1), MASK[:2].flip(1))
    seen = see(model, Look(), ids, mask)
    for row in range(2):
        own = mask[row].bool()
        alone = see(model, Look(), ids[row : row + 1, own], mask[row : row + 1, own])
        for entry, single in zip(seen, alone, strict=True):
            for name, value in single.signals.items():
                torch.testing.assert_close(entry.signals[name][row : row + 1], value, atol=1e-4, rtol=1e-4)


def test_norms_and_mean_outputs_are_those_of_the_output_projections_input(family):
    model = tiny_model(family)
    inputs = []
    handles = [
        site.output.register_forward_pre_hook(lambda _, args, site=site: inputs.append(site.geometry.split(args[0])))
        for site in find_sites(model)
    ]
    seen = see(model, Look(), mean_outputs=True)
    for handle in handles:
        handle.remove()
    for entry, heads in zip(seen, inputs, strict=True):
        torch.testing.assert_close(entry.signals["norm"].double(), head_norms(heads, MASK), atol=1e-4, rtol=1e-5)
        mean = torch.stack([x[own.bool()].mean(0) for x, own in zip(heads, MASK, strict=True)])
        torch.testing.assert_close(entry.mean_output, mean, atol=1e-5, rtol=1e-5)


def test_hidden_norms_are_those_of_equal_slices_of_what_the_layer_writes():
    model = tiny_model("qwen2")
    written = []
    handles = [site.output.register_forward_hook(lambda *args: written.append(args[2])) for site in find_sites(model)]
    seen = see(model, Look(norm="hidden"))
    for handle in handles:
        handle.remove()
    for entry, hidden in zip(seen, written, strict=True):
        truth = head_norms(hidden.view(*hidden.shape[:2], 8, 6), MASK)
        torch.testing.assert_close(entry.signals["norm"].double(), truth, atol=1e-4, rtol=1e-5)


def test_hidden_norms_that_cannot_be_sliced_are_refused():
    model = tiny_model("qwen3", hidden_size=44)
    with pytest.raises(ConfigError, match=r"slices the 44 hidden values into 8 equal pieces.*use norm='head'"):
        see(model, Look(norm="hidden"))


@pytest.mark.parametrize("options", [{"norm": "head"}, {"norm": "hidden", "window": None}])
def test_looking_changes_nothing(family, options):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=MASK).logits
        with watched(find_sites(model), MASK.bool(), Look(**options)):
            during = model(input_ids=IDS, attention_mask=MASK).logits
    assert during.equal(before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm": "body"}, "norm='body' is unknown; choose head or hidden"),
        ({"window": 0}, "window=0 was given; it must"),
    ],
)
def test_impossible_looks_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Look(**options)
