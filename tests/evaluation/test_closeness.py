"""KL, agreement and losses of texts against every token's distribution, one row and one token a pass, in float64."""

import pytest
import torch

from microglia.attach import attached
from microglia.errors import DataError
from microglia.evaluation.closeness import Closeness, bounded_batches, closeness
from microglia.ledger import Ledger
from tests.tiny import step_logits, tiny_model, wild

PAIRS = [([5, 9, 40, 7, 3], [8, 12, 30, 9]), ([6, 2], [50]), ([11, 12, 13, 14, 15, 16, 17, 18], [4, 4, 9, 61, 20])]


def slowly(model, pruner, prompt, text):
    """The same sums, token by token, without the first."""
    ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
    answer = torch.tensor([text[:-1]]).long()
    dense = step_logits(model, ids, mask, answer)[0].double().log_softmax(-1)
    with attached(model, pruner) as trace:
        pruned = step_logits(model, ids, mask, answer)[0].double().log_softmax(-1)
    kl = agreed = before = after = 0.0
    for p, q, token in list(zip(dense, pruned, text, strict=True))[1:]:
        kl += sum(float(p[v].exp() * (p[v] - q[v])) for v in range(len(p)))
        agreed += int(p.argmax() == q.argmax())
        before, after = before - float(p[token]), after - float(q[token])
    return Closeness(len(text) - 1, kl, int(agreed), before, after, trace.keep_ratio.item())


@pytest.mark.parametrize("execution", ["compact", "masked", "captured"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_batch_says_what_each_text_says_alone(family, execution):
    model = tiny_model(family)
    pruner, steps = wild(model), []
    found = closeness(model, PAIRS, pruner, execution=execution, progress=lambda *at: steps.append(at))
    for (prompt, text), one in zip(PAIRS, found, strict=True):
        slow = slowly(model, pruner, prompt, text)
        assert (one.tokens, one.agreed) == (slow.tokens, slow.agreed)
        for name in ("kl", "dense_loss", "pruned_loss", "keep_ratio"):
            assert getattr(one, name) == pytest.approx(getattr(slow, name), abs=2e-3)
        assert one.mean_kl == pytest.approx(one.kl / one.tokens if one.tokens else 0)
        assert 0 <= one.disagreement <= 1
    assert found[0].kl > 1e-3
    assert (found[1].tokens, found[1].kl, found[1].disagreement) == (0, 0, 0)
    assert steps[-1] == (3, 3)


def test_the_dense_model_is_at_no_distance_from_itself():
    model = tiny_model("llama")
    for one in closeness(model, PAIRS, wild(model), execution="dense"):
        assert (one.kl, one.disagreement, one.keep_ratio) == (0, 0, 1)
        assert one.dense_loss == one.pruned_loss


def test_batches_are_of_like_length_and_hold_no_more_than_they_may():
    lengths = [(3, 4), (9, 1), (2, 30), (5, 4), (1, 5), (7, 90)]
    batches = bounded_batches(lengths, 3, 40)
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert batches == [[1, 0, 3], [4], [2], [5]]  # 2 × 30 and 90 are more than 40
    assert [len(batch) for batch in bounded_batches([(1, 1)] * 7, 3, 40)] == [3, 3, 1]


def test_finished_batches_are_not_compared_again(tmp_path, monkeypatch):
    model = tiny_model("llama")
    pruner = wild(model)
    first = closeness(model, PAIRS, pruner, batch_size=1, ledger=Ledger(tmp_path / "x.jsonl"))
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr("microglia.evaluation.closeness.answer_logits", None)  # would fail if it were called
    assert closeness(model, PAIRS, pruner, batch_size=1, ledger=Ledger(tmp_path / "x.jsonl")) == first
    with pytest.raises(TypeError):
        closeness(model, PAIRS[:2], pruner, batch_size=1, ledger=Ledger(tmp_path / "x.jsonl"))
    other = wild(model, seed=1)
    with pytest.raises(TypeError):
        closeness(model, PAIRS, other, batch_size=1, ledger=Ledger(tmp_path / "x.jsonl"))


def test_a_text_beyond_the_context_is_refused():
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"have 300 tokens, but the model's context is 256; give shorter ones"):
        closeness(model, [([5] * 200, [6] * 101)], wild(model))
