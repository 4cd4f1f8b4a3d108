"""A training that begins from a criterion's ranks: the same order for every prompt, nothing pruned yet."""

import pytest
import torch

from microglia.criteria import CRITERIA
from microglia.criteria.start import start_from
from microglia.errors import ConfigError
from microglia.policies import POLICIES, SignalPolicy, StaticPolicy, new_agents
from tests.criteria.calibrated import calibration


@pytest.mark.parametrize("kind", ["static", "agents", "mixture"])
def test_logits_begin_in_the_order_of_the_scores_with_every_unit_kept(kind):
    cal = calibration()
    policy = (
        StaticPolicy.all_kept(cal.geometries) if kind == "static" else new_agents(kind, cal.geometries, hidden_dim=4)
    )
    assert type(policy) is POLICIES[kind]
    start_from("norm", policy, cal)
    scores = torch.cat([x.flatten() for x in CRITERIA["norm"]().scores(calibration())])
    features = [torch.zeros(1, x.shape[1]) for x in cal.readings(new_agents("agents", cal.geometries)).features]
    with torch.no_grad():
        logits = torch.cat([x[0] for x in policy(features)])
    assert float(logits.min()) > 0.5
    order = scores.argsort()
    assert float(torch.corrcoef(torch.stack([logits[order], torch.arange(len(order)).float()]))[0, 1]) > 0.98


def test_what_learns_nothing_has_no_start():
    with pytest.raises(ConfigError, match="start='norm' was given, but the policy 'signal' learns nothing; leave it"):
        start_from("norm", SignalPolicy("norm"), calibration())
    with pytest.raises(ConfigError, match="criterion='loudest' is unknown; choose"):
        start_from("loudest", StaticPolicy.all_kept(calibration().geometries), calibration())
