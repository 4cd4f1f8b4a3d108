"""Training steered by bytes of a decode step, with agents about every kind of unit."""

import pytest
import torch

from microglia.errors import ConfigError
from microglia.gate import Gate
from microglia.passes import answer_logits
from microglia.policies import new_agents
from microglia.pruner import Pruner
from microglia.signals import usual_signals
from microglia.training import TrainingConfig
from microglia.training.loss import answer_losses
from microglia.training.static_baseline import train_in_memory
from microglia.units import find_sites, step_costs
from tests.criteria.calibrated import Sums, calibration
from tests.units.many import KINDS, shuffled


def learner(cal, kind="agents", mode="hard"):
    """Untrained agents of a kind about everything."""
    arrangement = shuffled(cal.model)
    geometries = [site.geometry for site in find_sites(cal.model, KINDS, arrangement)]
    torch.manual_seed(0)
    policy = new_agents(kind, geometries, signals=usual_signals(KINDS), hidden_dim=8)
    return Pruner(policy, Gate(mode, bucket=1), units=KINDS, arrangement=arrangement)


@pytest.mark.parametrize("kind", ["agents", "mixture", "layers"])
@pytest.mark.parametrize("mode", ["soft", "straight-through"])
def test_every_parameter_gets_a_gradient_from_answer_and_bytes(kind, mode):
    cal = calibration("qwen2", num_hidden_layers=4)
    pruner = learner(cal, kind, mode)
    cal.model.requires_grad_(False)
    with torch.no_grad():  # masks that are all alike, as at the start, leave their router without a gradient
        for parameter in pruner.policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    costs = step_costs(cal.model, pruner.sites(cal.model))
    batch = cal.batches[0]
    logits, trace = answer_logits(cal.lm, batch, pruner)
    answer, spent = answer_losses(logits, batch.labels).mean(), costs.share(trace.keep).mean()
    for loss in (answer, spent):
        gradients = torch.autograd.grad(loss, list(pruner.policy.parameters()), retain_graph=True, allow_unused=True)
        protected = sum(site.geometry.protected == 2 for site in pruner.sites(cal.model))
        silent = sum(g is None or not bool(g.abs().sum() > 0) for g in gradients)
        # Agents of protected sublayers decide nothing: all their tensors, where a site has an agent of its own.
        assert silent == {"agents": 4, "mixture": 3, "layers": 0}[kind] * protected


def test_a_training_reaches_its_share_of_bytes():
    cal = calibration("llama", num_hidden_layers=4)
    pruner = learner(cal)
    config = TrainingConfig(
        max_steps=60, batch_size=4, byte_share=0.8, ramp=0.3, learning_rate=0.03, noise=(0.5, 0.0), save_steps=1000
    )
    result = train_in_memory(cal.model, cal.tokenizer, Sums(), pruner, config)
    last = [row for row in result.history if "byte_share" in row][-1]
    assert last["byte_share"] == pytest.approx(0.8, abs=0.08)
    assert last["target"] == pytest.approx(0.8, abs=0.01)
    assert 0 < last["keep_ratio"] < 1


def test_a_training_has_one_target():
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 and bytes=0.8 were given; a training has one target"):
        TrainingConfig(keep_ratio=0.5, byte_share=0.8)
    with pytest.raises(ConfigError, match=r"byte_share=0 was given; it must be above 0"):
        TrainingConfig(byte_share=0)
