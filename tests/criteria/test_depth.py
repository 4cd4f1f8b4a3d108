"""Criteria in which depth has a say."""

import itertools

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.criteria.cascade import Cascade
from microglia.criteria.norm import Norm
from microglia.criteria.upper_layers import UpperLayers
from microglia.errors import ConfigError
from tests.criteria.calibrated import calibration, raw_outputs


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_top_goes_first_and_within_a_site_the_least_written(family):
    cal = calibration(family, num_hidden_layers=3)
    scores = UpperLayers().scores(cal)
    assert scores[0].min() > scores[1].max()
    assert scores[1].min() > scores[2].max()
    for own, norms in zip(scores, Norm().scores(cal), strict=True):
        assert own.argsort().equal(norms.argsort())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_position_once_dropped_stays_dropped(family):
    cal = calibration(family, num_hidden_layers=4, batch_size=3)
    scores = Cascade().scores(cal)
    shares = []
    for outputs in raw_outputs(cal):
        size = outputs.abs().mean((0, 2))
        shares.append(size / size.mean())
    for depth in range(4):
        means = [sum(shares[: d + 1]) / (d + 1) for d in range(depth + 1)]
        expected = torch.stack(means).min(0).values
        torch.testing.assert_close(scores[depth].double(), expected, atol=1e-5, rtol=0)
    for threshold in torch.cat(scores):
        kept = [set((x > threshold).nonzero().flatten().tolist()) for x in scores]
        assert all(deeper <= above for above, deeper in itertools.pairwise(kept))


def test_positions_must_mean_the_same_in_every_site():
    class Uneven(type(calibration())):
        geometries = (HeadGeometry(8, 8, 6), HeadGeometry(4, 4, 12))

    base = calibration()
    cal = Uneven(base.model, base.tokenizer, base.task, base.examples)
    with pytest.raises(ConfigError, match=r"same heads in every site, but there are \[4, 8\]"):
        Cascade().scores(cal)
