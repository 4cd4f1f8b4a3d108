"""What holds for every criterion: the model untouched, the same seed the same scores, saved and loaded alike."""

from dataclasses import fields, replace

import pytest
import torch

from microglia.checkpoint import Checkpoint
from microglia.criteria import CRITERIA, get_criterion
from microglia.errors import ConfigError
from tests.criteria.calibrated import calibration
from tests.criteria.test_static_baseline import SHORT

QUICK = {"steps": 3, "permutations": 1, "probes": 1, "config": replace(SHORT, max_steps=2)}
PER_INPUT = [name for name in CRITERIA if CRITERIA[name].per_input]


def quick(name):
    """The criterion with few steps."""
    known = {f.name for f in fields(CRITERIA[name])}
    return get_criterion(name, **{option: value for option, value in QUICK.items() if option in known})


def units_of(name):
    """The first kind that a criterion scores."""
    return CRITERIA[name].units[:1]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_the_model_stays_as_it_was_and_the_seed_decides(name, family, snapshot):
    cal = calibration(family, batch_size=3, units=units_of(name))
    attributes = [set(vars(m)) for m in cal.model.modules()]
    before, state = snapshot(cal.model), torch.random.get_rng_state()
    policy = quick(name).policy(cal)
    assert torch.random.get_rng_state().equal(state)
    assert snapshot(cal.model) == before
    assert [set(vars(m)) for m in cal.model.modules()] == attributes
    assert all(p.grad is None for p in cal.model.parameters())
    again = quick(name).policy(cal)
    assert all(a.equal(b) for a, b in zip(policy.logits, again.logits, strict=True))
    flat = torch.cat(list(policy.logits))
    assert flat.isfinite().all()
    assert flat.unique().numel() >= (8 if cal.units == ("head",) else 3)
    assert not any(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("name", PER_INPUT)
def test_a_policy_that_scores_each_prompt_comes_back_from_disk(name, tmp_path):
    cal = calibration("qwen2", units=units_of(name))
    policy = quick(name).policy(cal, per_input=True)
    before = cal.logits(policy)
    assert not all(x.equal(x[:1].expand_as(x)) for x in before)
    pruner = cal.pruner(policy).with_budget(before, cal.geometries)
    checkpoint = Checkpoint.of(cal.model, pruner, base_model="tiny")
    checkpoint.save_pretrained(tmp_path)
    loaded = Checkpoint.from_pretrained(tmp_path).pruner
    assert type(loaded.policy) is type(policy)
    assert all(a.equal(b) for a, b in zip(cal.logits(loaded.policy), before, strict=True))
    assert all(a.equal(b) for a, b in zip(loaded.budget.logits, before, strict=True))
    kind = {"predictor": "predictor", "agents": "agents"}.get(name, "own signal")
    assert kind in (tmp_path / "README.md").read_text()
    if name in ("norm", "entropy"):
        both = replace(checkpoint.config, signals=("norm", "entropy"))
        with pytest.raises(ConfigError, match="'norm,entropy' is not one signal; choose norm, entropy, conflict"):
            both.new_policy()


def test_some_criteria_score_each_prompt():
    assert PER_INPUT == ["agents", "block_influence", "conflict", "entropy", "griffin", "norm", "predictor"]
