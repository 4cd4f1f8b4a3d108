"""What looking at a prompt adds to each layer, in kernels that a GPU's host would launch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from microglia.attach import attached
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.signals import SIGNALS, Prompt, measured
from microglia.units import find_sites
from tests.tiny import geometries_of, positions, tiny_model, tiny_prompts

IDS, MASK = tiny_prompts(40, 33)
FEW = {"_unsafe_view", "empty", "empty_strided", "new_empty", "empty_like", "_to_copy"}  # without work, or to the host


class Launches(TorchDispatchMode):
    """Counts operations that are more than a view."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.count += not func.is_view and name not in FEW
        return func(*args, **(kwargs or {}))


def launches(layers, rows, *, pruned):
    model = tiny_model("llama", num_hidden_layers=layers)
    ids, mask = IDS[:rows], MASK[:rows]
    pruner = Pruner(AgentPolicy(geometries_of(model), hidden_dim=16))
    with torch.inference_mode(), Launches() as counted:
        if pruned:
            with attached(model, pruner, "dense"):
                model(ids, attention_mask=mask, position_ids=positions(mask))
        else:
            model(ids, attention_mask=mask, position_ids=positions(mask))
    return counted.count


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Entropies by the kernel that returns the logsumexp: here the CPU's, of the same contract."""
    monkeypatch.setattr("microglia.signals.entropy.by_kernel", lambda query, softcap: softcap is None)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_layer_costs_two_launches(as_on_a_gpu, rows):
    """Norms, and a copy of the last queries. Averages, attention, agents and gate are made of all layers at once."""
    added = {n: launches(n, rows, pruned=True) - launches(n, rows, pruned=False) for n in (2, 6)}
    assert (added[6] - added[2]) / 4 == 2
    assert added[2] - 2 * 2 <= 85


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("family", "backend"), [("llama", "sdpa"), ("qwen2", "eager"), ("mistral", "eager")])
def test_what_waits_is_what_is_measured_at_once(as_on_a_gpu, monkeypatch, family, backend, rows):
    model = tiny_model(family, backend=backend)
    ids, mask = IDS[:rows], MASK[:rows]

    def values():
        sites = find_sites(model)
        signals = [SIGNALS["norm"], SIGNALS["entropy"]]
        with torch.no_grad(), measured(sites, signals, Prompt(mask.bool(), 8)) as result:
            model(ids, attention_mask=mask, position_ids=positions(mask))
        return result.values

    waiting = values()
    for module in ("norm", "entropy"):
        monkeypatch.setattr(f"microglia.signals.{module}.FEW", 0)
    for name, sites in values().items():
        for index, value in sites.items():
            torch.testing.assert_close(waiting[name][index], value, atol=2e-6, rtol=2e-6)
