"""What happened to every head: means over all prompts, however they were batched."""

import json

import pytest
import torch

from microglia.evaluation.heads import HeadMeans


def test_means_do_not_depend_on_the_batches():
    keep = [(torch.rand(5, h, generator=torch.Generator().manual_seed(h)) > 0.4).float() for h in (4, 6)]
    norm = [torch.rand(5, h) for h in (4, 6)]
    whole, parts = HeadMeans(), HeadMeans()
    whole.add(keep, [{"norm": x} for x in norm])
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts.add([x[rows] for x in keep], [{"norm": x[rows]} for x in norm])
    expected = {"kept": keep, "norm": norm}
    for result in (whole.as_json(), parts.as_json()):
        assert result.keys() == expected.keys()
        for name, tensors in expected.items():
            for shown, tensor in zip(result[name], tensors, strict=True):
                assert shown == pytest.approx(tensor.mean(0).tolist(), abs=1e-6)


def test_a_dense_model_says_nothing_of_heads():
    means = HeadMeans()
    means.add([], [])
    assert means.as_json() == {}


def test_sums_come_back_from_json_as_they_were():
    generator, means, again = torch.Generator().manual_seed(1), HeadMeans(), HeadMeans()
    for prompts in (3, 1, 4):
        part = HeadMeans()
        keep = [torch.rand(prompts, 2, generator=generator) for _ in range(2)]
        signals = [{"norm": torch.rand(prompts, 2, generator=generator)} for _ in range(2)]
        for one in (means, part):
            one.add(keep, signals)
        again.add_json(json.loads(json.dumps(part.to_json())))
    assert again.as_json() == means.as_json()
    again.add_json(HeadMeans().to_json())  # of a dense model
    assert again.prompts == 8
