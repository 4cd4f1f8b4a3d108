"""Attention by products against the textbook in float64."""

import pytest
import torch

from microglia.execution.captured.decode import by_products


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_attention(groups, softcap, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, t, 8).to(dtype) for n, t in ((6, 1), (groups, 11), (groups, 11)))
    mask = torch.zeros(2, 1, 1, 11, dtype=dtype)
    mask[0, ..., 7:] = mask[1, ..., :3] = torch.finfo(dtype).min
    ours = by_products(query, key, value, mask, scale=0.4, softcap=softcap)
    q, k, v = (x.double().repeat_interleave(6 // x.shape[1], 1) for x in (query, key, value))
    scores = (q @ k.mT) * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    truth = ((scores + mask.double()).softmax(-1) @ v).transpose(1, 2)
    assert ours.shape == (2, 1, 6, 8)
    error = (ours.double() - truth).abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 2e-2)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # as the library's eager attention does it
    scores = (q @ k.mT) * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    theirs = ((scores + mask).softmax(-1, dtype=torch.float32).to(dtype) @ v).transpose(1, 2)
    assert error <= 2 * (theirs.double() - truth).abs().max() + 1e-6
