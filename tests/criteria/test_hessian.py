"""Traces of each head's block against the whole Hessian, entry by entry."""

import pytest
import torch

from microglia.criteria.hessian import Hessian
from tests.criteria.calibrated import calibration

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


class EveryWeight(Hessian):
    """One probe per weight, of length √n: their mean is the trace itself."""

    def draw(self, weights):
        count = sum(w.numel() for w in weights)
        unit = torch.eye(count) * count**0.5
        shapes = [w.shape for w in weights]
        split = [row.split([w.numel() for w in weights]) for row in unit]
        return [[x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)] for parts in split]


def exact(cal, conv):
    """The Hessian of the mean answer loss in both sites' o weights (out, in) used at answer positions."""
    batch = cal.batches[0]
    start = batch.prompt.shape[1]
    weights = [s.output.weight.T if conv else s.output.weight for s in cal.sites]
    flat = torch.cat([w.detach().flatten() for w in weights])

    def loss(values):
        def hook(w):
            def replaced(module, inputs, output):
                fresh = inputs[0] @ w.T + (module.bias if module.bias is not None else 0)
                return torch.cat([output[:, :start], fresh[:, start:]], 1)

            return replaced

        parts = [x.reshape(8, 8) for x in values.split(64)]
        handles = [s.output.register_forward_hook(hook(w)) for s, w in zip(cal.sites, parts, strict=True)]
        mask = torch.cat([batch.prompt_mask, batch.answer_mask[:, :-1]], 1)
        logits = cal.lm(
            input_ids=torch.cat([batch.prompt, batch.answer[:, :-1]], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[:, start - 1 :]
        for handle in handles:
            handle.remove()
        rows = [
            torch.nn.functional.cross_entropy(row, labels) for row, labels in zip(logits, batch.labels, strict=True)
        ]
        return torch.stack(rows).mean()

    return torch.autograd.functional.hessian(loss, flat), weights


@pytest.mark.parametrize(("family", "groups"), [("llama", 2), ("qwen2", 1), ("gpt2", None)])
def test_every_weight_probed_gives_the_exact_traces(family, groups):
    changes = {**SMALL, **({"num_key_value_heads": groups} if groups else {})}
    ours = EveryWeight().scores(calibration(family, batch_size=3, **changes))
    whole, weights = exact(calibration(family, backend="eager", **changes), family == "gpt2")
    diagonal = whole.diagonal().reshape(2, 8, 8)  # site, out, in
    for site in range(2):
        for head in range(2):
            own = slice(head * 4, head * 4 + 4)
            trace, w = diagonal[site][:, own].sum(), weights[site][:, own]
            truth = trace / (2 * w.numel()) * w.square().sum()
            assert ours[site][head].item() == pytest.approx(truth.item(), rel=2e-3, abs=1e-5)


def test_random_signs_come_close():
    cal = calibration("qwen2", num_key_value_heads=1, **SMALL)
    torch.manual_seed(0)
    estimate, truth = torch.cat(Hessian(probes=200).scores(cal)), torch.cat(EveryWeight().scores(cal))
    assert (estimate - truth).norm() < 0.25 * truth.norm()
