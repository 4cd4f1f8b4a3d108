"""Head norms against the definition; features are signals side by side."""

import pytest
import torch

from microglia.errors import ConfigError
from microglia.signals import SIGNALS, feature_size, mean_norm, stack_features
from tests.reference import head_norms

OUTPUTS = torch.randn(3, 9, 4, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(9) >= torch.tensor([[0], [3], [8]])


def test_mean_norm_is_naive():
    torch.testing.assert_close(mean_norm(OUTPUTS, TOKENS).double(), head_norms(OUTPUTS, TOKENS), atol=1e-6, rtol=0)


def test_padding_does_not_count():
    disturbed = torch.where(TOKENS[..., None, None], OUTPUTS, 1e6)
    assert mean_norm(disturbed, TOKENS).equal(mean_norm(OUTPUTS * TOKENS[..., None, None], TOKENS))


@pytest.mark.parametrize(("features", "size"), [("both", 8), ("norm", 4), ("entropy", 4)])
def test_features_have_the_size_that_was_promised(features, size):
    signals = {name: torch.full((3, 4), float(index)) for index, name in enumerate(SIGNALS)}
    stacked = stack_features(signals, features)
    assert stacked.shape == (3, size)
    assert feature_size(4, features) == size
    assert stacked[0].unique().tolist() == ([0, 1] if features == "both" else [SIGNALS.index(features)])


def test_unknown_features_are_refused():
    with pytest.raises(ConfigError, match=r"features='loudness' is unknown; choose both, norm or entropy"):
        feature_size(4, "loudness")
