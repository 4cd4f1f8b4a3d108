"""Fluctuation and activation variance against two passes of numpy."""

import math

import numpy as np
import pytest
import torch

from microglia.criteria.activation_variance import ActivationVariance, depth_rates
from microglia.criteria.fluctuation import Fluctuation
from microglia.criteria.moments import Moments, moments
from microglia.errors import ConfigError
from tests.criteria.calibrated import LAYOUTS, calibration, raw_outputs
from tests.criteria.test_static import by_hand


def strengths(cal, family, power):
    """Σ variance × ‖o column‖^power of every head, (H,) per site, in numpy."""
    found = []
    for site, outputs in zip(cal.sites, raw_outputs(cal), strict=True):
        x = outputs.numpy()  # (N, H, D)
        centre = x.sum(0) / len(x)
        variance = ((x - centre) ** 2).sum(0) / len(x)
        o = by_hand(site.attention, family)[-1].detach().double().numpy()  # (out, H·D)
        columns = np.sqrt((o**2).sum(0)).reshape(variance.shape)
        found.append((variance * columns**power).sum(1))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_moments_are_those_of_two_passes(batch_size):
    cal = calibration("qwen2", batch_size=batch_size)
    for seen, outputs in zip(moments(cal), raw_outputs(cal), strict=True):
        assert seen.count == len(outputs)
        torch.testing.assert_close(seen.mean, outputs.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(seen.variance, outputs.var(0, correction=0), atol=1e-6, rtol=1e-5)


def test_a_variance_far_from_zero_keeps_its_digits():
    torch.manual_seed(0)
    x = 1e6 + torch.randn(60, 2, 3, dtype=torch.float64)
    seen = Moments(0, torch.zeros(2, 3), torch.zeros(2, 3))
    for part in x.split(7):
        seen = seen.joined(part)
    torch.testing.assert_close(seen.variance, x.var(0, correction=0), atol=0, rtol=1e-8)


@pytest.mark.parametrize("family", LAYOUTS)
def test_fluctuation_is_variance_times_squared_column_standardised_per_site(family):
    cal = calibration(family, batch_size=3)
    for ours, strength in zip(Fluctuation().scores(cal), strengths(cal, family, 2), strict=True):
        np.testing.assert_allclose(ours.numpy(), (strength - strength.mean()) / strength.std(), atol=1e-4)
    assert Fluctuation.fill == "mean"


@pytest.mark.parametrize("family", LAYOUTS)
def test_activation_variance_takes_heads_by_depth(family):
    layers = {"num_hidden_layers": 5}
    cal = calibration(family, **layers)
    scores = ActivationVariance(steepness=3.0).scores(cal)
    rates = [1e-3, *(1 / (1 + math.exp(-3 * (depth - 0.5))) for depth in (0.25, 0.5, 0.75)), 1e-3]
    for ours, strength, rate in zip(scores, strengths(cal, family, 1), rates, strict=True):
        worse = [(strength < own).sum() for own in strength]  # heads of the site that go before this one
        np.testing.assert_allclose(ours.numpy(), (np.array(worse) + 1) / 8 / rate, rtol=1e-5)
    for threshold in (0.3, 0.9):
        gone = [int((x <= threshold).sum()) for x in scores]
        assert gone == [0, *(math.floor(8 * min(1, threshold * rate)) for rate in rates[1:4]), 0]


def test_depth_has_no_say_without_steepness():
    assert depth_rates(5, 0.0) == [1e-3, 0.5, 0.5, 0.5, 1e-3]
    assert depth_rates(1, 4.0) == [1e-3]
    with pytest.raises(ConfigError, match=r"steepness=-1 was given; it must be 0 or more"):
        ActivationVariance(steepness=-1)
