"""Head norms against the definition; features are signals side by side."""

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.signals import SIGNALS, check_signals, feature_size, mean_norm, split_features, stack_features
from tests.reference import head_norms

OUTPUTS = torch.randn(3, 9, 4, 8, generator=torch.Generator().manual_seed(0))
GEOMETRY = HeadGeometry(4, 4, 8)
TOKENS = torch.arange(9) >= torch.tensor([[0], [3], [8]])


def test_mean_norm_is_naive():
    torch.testing.assert_close(mean_norm(OUTPUTS, TOKENS).double(), head_norms(OUTPUTS, TOKENS), atol=1e-6, rtol=0)


def test_padding_does_not_count():
    disturbed = torch.where(TOKENS[..., None, None], OUTPUTS, 1e6)
    assert mean_norm(disturbed, TOKENS).equal(mean_norm(OUTPUTS * TOKENS[..., None, None], TOKENS))


@pytest.mark.parametrize(
    ("names", "size"), [(("norm", "entropy"), 8), (("norm",), 4), (("entropy",), 4), ((), 0)], ids=str
)
def test_features_have_the_size_that_was_promised(names, size):
    signals = {name: torch.full((3, 4), float(index)) for index, name in enumerate(SIGNALS)}
    assert feature_size(GEOMETRY, names) == size
    if names:
        stacked = stack_features(signals, names)
        assert stacked.shape == (3, size)
        assert stacked[0].unique().tolist() == [list(SIGNALS).index(name) for name in names]


@pytest.mark.parametrize("names", [("norm", "entropy"), ("norm",), ("entropy",)], ids="+".join)
def test_signals_are_what_features_were_made_of(names):
    signals = {"norm": torch.rand(2, 4), "entropy": torch.rand(2, 4)}
    split = split_features(stack_features(signals, names), names)
    assert all(torch.equal(split[name], signals[name]) for name in split)
    assert tuple(split) == names


def test_without_signals_there_are_none():
    assert split_features(torch.zeros(2, 0), ()) == {}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("norm", "loudness"), "signals='loudness' is unknown; choose norm, entropy, "),
        (("norm", "norm"), "signals='norm,norm' names a signal twice; name each one once"),
    ],
)
def test_unknown_and_repeated_signals_are_refused(names, sentence):
    for check in (check_signals, lambda names: feature_size(GEOMETRY, names)):
        with pytest.raises(ConfigError, match=sentence):
            check(names)
