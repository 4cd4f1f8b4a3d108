"""What is measured of a prompt on whole models, against eager attention weights in float64."""

import pytest
import torch

from microglia.signals import SIGNALS, MeanOutput, Prompt, measured
from microglia.units import find_sites
from tests.reference import entropy_of, head_norms, sliding_windows
from tests.tiny import BACKENDS, positions, tiny_model, tiny_prompts

IDS, MASK = tiny_prompts(14, 9, 1)
BOTH = [SIGNALS["norm"], SIGNALS["entropy"]]


def measure(model, ids=IDS, mask=MASK, *, window=64, signals=BOTH):
    """The values (B, U) of every site by the names of the signals, site by site."""
    sites = find_sites(model)
    with torch.no_grad(), measured(sites, signals, Prompt(mask.bool(), window)) as result:
        model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    assert result.complete
    return [{name: values[site.index] for name, values in result.values.items()} for site in sites]


@pytest.mark.parametrize("window", [None, 4])
def test_entropy_is_that_of_the_eager_attention_weights(family, window):
    model = tiny_model(family, backend="eager")
    with torch.no_grad():
        weights = model(IDS, attention_mask=MASK, position_ids=positions(MASK), output_attentions=True).attentions
    sites = measure(model, window=window)
    for values, truth, sliding in zip(sites, weights, sliding_windows(model.config), strict=True):
        expected = entropy_of(truth, MASK, window=window, sliding_window=sliding)
        torch.testing.assert_close(values["entropy"].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [name for name, backend in BACKENDS if backend == "sdpa"])
def test_sdpa_and_eager_measure_the_same(family):
    model = tiny_model(family)
    before = measure(model)
    model.set_attn_implementation("eager")
    for sdpa, eager in zip(before, measure(model), strict=True):
        for name in ("norm", "entropy"):
            torch.testing.assert_close(sdpa[name], eager[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_partial_entropies_are_finished_when_the_prompt_was_read(family, rows, monkeypatch):
    """On a GPU a site leaves a partial entropy, all of which are finished at the end; the signals are the same."""
    model = tiny_model(family, backend="eager")
    truth = measure(model, IDS[:rows], MASK[:rows])
    monkeypatch.setattr("microglia.signals.entropy.by_kernel", lambda query, softcap: softcap is None)
    monkeypatch.setattr("microglia.signals.entropy.PART", 4)
    for values, slow in zip(measure(model, IDS[:rows], MASK[:rows]), truth, strict=True):
        torch.testing.assert_close(values["entropy"], slow["entropy"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_measured(family, side):
    model = tiny_model(family)
    ids, mask = (IDS[:2], MASK[:2]) if side == "left" else (IDS[:2].flip(1), MASK[:2].flip(1))
    together = measure(model, ids, mask)
    for row in range(2):
        tokens = mask[row].bool()
        alone = measure(model, ids[row : row + 1, tokens], mask[row : row + 1, tokens])
        for values, single in zip(together, alone, strict=True):
            assert values.keys() == single.keys() == {"norm", "entropy"}
            for name, value in single.items():
                torch.testing.assert_close(values[name][row : row + 1], value, atol=1e-4, rtol=1e-4)


def test_norms_and_mean_outputs_are_those_of_the_output_projections_input(family):
    model = tiny_model(family)
    inputs = []
    handles = [
        site.output.register_forward_pre_hook(lambda _, args, site=site: inputs.append(site.geometry.split(args[0])))
        for site in find_sites(model)
    ]
    sites = measure(model, signals=[*BOTH, MeanOutput()])
    for handle in handles:
        handle.remove()
    for values, heads in zip(sites, inputs, strict=True):
        torch.testing.assert_close(values["norm"].double(), head_norms(heads, MASK), atol=1e-4, rtol=1e-5)
        mean = torch.stack([x[tokens.bool()].mean(0) for x, tokens in zip(heads, MASK, strict=True)])
        torch.testing.assert_close(values["mean_output"], mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [64, None])
def test_measuring_changes_nothing(family, window):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=MASK).logits
        with measured(find_sites(model), [*BOTH, MeanOutput()], Prompt(MASK.bool(), window)):
            during = model(input_ids=IDS, attention_mask=MASK).logits
    assert during.equal(before)


def test_features_stand_side_by_side_in_the_order_of_the_signals():
    model = tiny_model("qwen2")
    sites = find_sites(model)
    with torch.no_grad(), measured(sites, BOTH, Prompt(MASK.bool(), 64)) as result:
        model(input_ids=IDS, attention_mask=MASK)
    for site in sites:
        norm, entropy = (result.values[name][site.index] for name in ("norm", "entropy"))
        assert result.features(site, ("entropy", "norm")).equal(torch.cat([entropy, norm], 1))
        assert result.features(site, ("norm",)).equal(norm)
        assert result.features(site, ()).shape == (3, 0)


def test_a_pass_that_failed_is_not_complete():
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        measured(find_sites(model), BOTH, Prompt(MASK.bool(), 64)) as result,
    ):
        model(input_ids=IDS, attention_mask=MASK)
    assert not result.complete
