"""Streaming entropy against explicit softmax matrices in float64."""

import pytest
import torch

from microglia.signals import Queries, attention_entropy
from tests.reference import attention_weights, entropy_of

ONES = torch.ones(3, 13, dtype=torch.bool)
LEFT = torch.arange(13) >= torch.tensor([[0], [5], [12]])
RIGHT = torch.arange(13) < torch.tensor([[13], [5], [1]])


def queries_and_keys(heads, groups, *, spread=2.0):
    torch.manual_seed(0)
    return spread * torch.randn(3, heads, 13, 8), spread * torch.randn(3, groups, 13, 8)


@pytest.mark.parametrize("tokens", [ONES, LEFT, RIGHT], ids=["whole", "left", "right"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 4, 64])
def test_streaming_is_naive(tokens, groups, window):
    query, key = queries_and_keys(6, groups)
    truth = entropy_of(attention_weights(query, key, tokens, scale=0.3), tokens, window=window)
    ours = attention_entropy(query, key, tokens, scale=0.3, window=window)
    torch.testing.assert_close(ours.double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("tokens", [ONES, LEFT, RIGHT], ids=["whole", "left", "right"])
@pytest.mark.parametrize(("sliding_window", "softcap"), [(1, None), (4, None), (None, 2.0), (4, 2.0)])
def test_streaming_is_naive_with_sliding_window_and_softcap(tokens, sliding_window, softcap):
    query, key = queries_and_keys(4, 2)
    weights = attention_weights(query, key, tokens, scale=0.5, sliding_window=sliding_window, softcap=softcap)
    truth = entropy_of(weights, tokens, sliding_window=sliding_window)
    ours = attention_entropy(query, key, tokens, scale=0.5, window=None, sliding_window=sliding_window, softcap=softcap)
    torch.testing.assert_close(ours.double(), truth, atol=2e-6, rtol=0)


def test_blocks_leave_no_seam(monkeypatch):
    query, key = queries_and_keys(4, 2)
    whole = attention_entropy(query, key, LEFT, scale=0.5, window=None)
    monkeypatch.setattr("microglia.signals.queries.BLOCK", 3)
    torch.testing.assert_close(attention_entropy(query, key, LEFT, scale=0.5, window=None), whole)


def test_entropy_is_one_when_all_keys_are_alike_and_zero_when_one_wins():
    query, key = torch.ones(3, 2, 13, 8), torch.ones(3, 2, 13, 8)
    alike = attention_entropy(query, key, ONES, scale=1.0, window=4)
    torch.testing.assert_close(alike, torch.ones(3, 2))
    key[:, :, 1:] = -100
    assert attention_entropy(query, key, ONES, scale=1.0, window=None).max() == 0


def test_a_single_token_has_no_entropy():
    query, key = queries_and_keys(4, 2)
    assert attention_entropy(query, key, LEFT, scale=1.0)[2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("spread", [1e-4, 30.0])
def test_extreme_logits_stay_between_zero_and_one(spread):
    query, key = queries_and_keys(4, 2, spread=spread)
    ours = attention_entropy(query, key, LEFT, scale=1.0)
    assert ours.isfinite().all()
    assert ours.min() >= 0
    assert ours.max() <= 1 + 1e-6


@pytest.fixture
def by_kernel(monkeypatch):
    """The GPU's way, by the kernel that returns the logsumexp: here with the CPU's kernel of the same contract."""
    monkeypatch.setattr("microglia.signals.entropy.by_kernel", lambda query, softcap: softcap is None)


@pytest.mark.parametrize("tokens", [ONES, LEFT, RIGHT], ids=["whole", "left", "right"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_an_entropy_by_the_kernel_is_naive(by_kernel, tokens, groups, sliding_window):
    query, key = queries_and_keys(6, groups)
    weights = attention_weights(query, key, tokens, scale=0.3, sliding_window=sliding_window)
    truth = entropy_of(weights, tokens, window=5, sliding_window=sliding_window)
    ours = attention_entropy(query, key, tokens, scale=0.3, window=5, sliding_window=sliding_window)
    torch.testing.assert_close(ours.double(), truth, atol=5e-6, rtol=0)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_keys_of_one_prompt_may_go_in_parts(by_kernel, monkeypatch, row, parts, sliding_window):
    monkeypatch.setattr("microglia.signals.entropy.PARTS", parts)
    monkeypatch.setattr("microglia.signals.entropy.PART", 1)
    (query, key), tokens = queries_and_keys(6, 2), LEFT[row : row + 1]
    query, key = query[row : row + 1], key[row : row + 1].transpose(1, 2).contiguous().transpose(1, 2)  # as in models
    weights = attention_weights(query, key, tokens, scale=0.3, sliding_window=sliding_window)
    truth = entropy_of(weights, tokens, window=5, sliding_window=sliding_window)
    ours = attention_entropy(query, key, tokens, scale=0.3, window=5, sliding_window=sliding_window)
    torch.testing.assert_close(ours.double(), truth, atol=5e-6, rtol=0)


def test_queries_are_found_once_for_all_sites():
    query, key = queries_and_keys(4, 2)
    queries = Queries(LEFT, 4)
    for sliding_window in (None, 3, None):
        once = attention_entropy(query, key, queries, scale=0.5, sliding_window=sliding_window)
        assert once.equal(attention_entropy(query, key, LEFT, scale=0.5, window=4, sliding_window=sliding_window))
