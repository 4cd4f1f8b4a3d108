"""One MLP at the first site that tells prompts apart."""

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.criteria.predictor import Predictor, targets
from microglia.errors import ConfigError
from microglia.policies import PredictorPolicy
from tests.criteria.calibrated import calibration

GEOMETRIES = [HeadGeometry(8, 4, 6), HeadGeometry(6, 6, 8)]


def test_targets_are_slopes_of_unit_length_per_site_standardised_over_all():
    cal = calibration("qwen2", batch_size=3)
    rows = []
    for example in range(4):
        parts = []
        for slopes in cal.keep_gradients():
            size = slopes[example].abs()
            parts.append(size / size.square().sum().sqrt())
        rows.append(torch.cat(parts))
    flat = torch.stack(rows)
    torch.testing.assert_close(targets(cal), (flat - flat.mean()) / flat.std(correction=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_learns_what_each_prompt_needs(family):
    cal = calibration(family)
    wanted = targets(cal)
    policy = Predictor(hidden_dim=32, learning_rate=1e-2).policy(cal, per_input=True)
    assert policy.statistics.mean.abs().sum() > 0
    predicted = torch.cat(cal.logits(policy), -1)
    own = (predicted - wanted).square().mean()
    anyones = (wanted.mean(0) - wanted).square().mean()  # the best that does not look at the prompt
    assert own < 0.2 * anyones


def test_static_is_the_mean_over_prompts():
    cal = calibration("qwen2")
    criterion = Predictor(hidden_dim=16, steps=20)
    torch.manual_seed(0)
    expected = [x.mean(0) for x in cal.logits(criterion.adaptive(cal))]
    torch.manual_seed(0)
    assert all(a.equal(b) for a, b in zip(criterion.scores(cal), expected, strict=True))
    assert all(not x.equal(x[:1].expand_as(x)) for x in cal.logits(criterion.policy(cal, per_input=True)))


def test_only_the_first_site_decides():
    policy = PredictorPolicy(GEOMETRIES, hidden_dim=4)
    torch.nn.init.normal_(policy.agent.network[-1].weight)
    first, second = torch.randn(3, 16), torch.randn(3, 12)
    logits = policy([first, second])
    assert [tuple(x.shape) for x in logits] == [(3, 8), (3, 6)]
    assert all(a.equal(b) for a, b in zip(logits, policy([first, second + 1]), strict=True))
    assert not policy([first + torch.randn(3, 16), second])[1].equal(logits[1])


def test_what_cannot_be_gets_a_sentence():
    with pytest.raises(ConfigError, match="steps=0 was given; it must be above 0"):
        Predictor(steps=0)
