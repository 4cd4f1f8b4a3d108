"""Any geometry, bucket and scores: the decision is rectangular, never empty, the same in a batch, and carried out."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.anatomy import HeadGeometry
from microglia.attach import attached
from microglia.gate import Gate, keep_ratio
from microglia.pruner import Budget, Pruner
from tests.tiny import Fixed, step_logits, tiny_model, tiny_prompts

quick = settings(max_examples=150)


@st.composite
def decisions(draw):
    """Geometry, bucket and scores (B, H), some of them equal, zero or huge."""
    groups, queries, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    geometry = HeadGeometry(groups * queries, groups, 4)
    numbers = st.floats(-(2.0**90), 2.0**90, width=32) | st.sampled_from([-1.0, 0.0, 1.0])
    count = rows * geometry.heads
    scores = torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float32)
    return geometry, draw(st.none() | st.integers(1, 9)), scores.view(rows, geometry.heads)


@quick
@given(decisions())
def test_a_decision_is_a_rectangle_of_the_best(drawn):
    geometry, bucket, scores = drawn
    keep = geometry.rectangle(scores, bucket)
    for row, asked in zip(geometry.by_group(keep), geometry.by_group(scores), strict=True):
        counts = {int(group.sum()) for group in row} - {0}
        assert len(counts) == 1  # never empty, the same in every kept group
        kept = row.any(-1)
        assert kept[asked.amax(-1) > 0].all()  # a group with an asked head is never lost
        for group, wanted in zip(row[kept], asked[kept], strict=True):
            if not group.all():
                assert wanted[group].min() >= wanted[~group].max()
    if geometry.queries_per_group == 1:
        assert keep[scores > 0].all()


@quick
@given(decisions())
def test_a_row_decides_alone_as_in_a_batch(drawn):
    geometry, bucket, scores = drawn
    together = geometry.rectangle(scores, bucket)
    for index, row in enumerate(scores):
        assert geometry.rectangle(row[None], bucket)[0].equal(together[index])


@quick
@given(decisions())
def test_rows_that_share_a_rectangle_keep_what_they_asked_for(drawn):
    geometry, bucket, scores = drawn
    keep = geometry.rectangle(scores, bucket)
    shape = geometry.row_shape(keep)
    for groups, heads, kept, decided in zip(shape.groups, shape.heads, shape.kept.bool(), keep, strict=True):
        assert {*heads[kept].tolist()} == {*decided.nonzero().flatten().tolist()}
        assert len({*heads.tolist()}) == shape.heads.shape[1] == len(groups) * shape.queries_per_group
        assert {*geometry.group_of(heads).tolist()} == {*groups.tolist()}


@quick
@given(decisions(), st.floats(0.01, 1))
def test_a_budget_never_keeps_less_than_was_asked(drawn, target):
    geometry, bucket, scores = drawn
    logits = scores.clamp(-50, 50)
    threshold = Budget([logits], [geometry], bucket).threshold(target)
    keep = Gate(threshold=threshold, bucket=bucket)(logits, geometry)
    assert keep_ratio([keep]).mean() >= target - 1e-6


@settings(max_examples=40)
@given(
    family=st.sampled_from(["llama", "qwen3", "mistral", "phi3", "gemma3_text"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 8])),
    bucket=st.none() | st.integers(1, 4),
    fill=st.sampled_from(["zero", "mean"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_pattern_is_compacted_as_it_is_masked(family, shape, bucket, fill, lengths, data):
    groups, queries, head_dim = shape
    heads = groups * queries
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim}
    # Phi-3 has no head size of its own; the others want a multiple of any number of heads that is drawn.
    sizes["hidden_size"] = heads * head_dim if family == "phi3" else 72
    model = tiny_model(family, **sizes)
    rows = data.draw(st.sampled_from([1, len(lengths)]))
    asked = data.draw(st.lists(st.booleans(), min_size=2 * rows * heads, max_size=2 * rows * heads))
    policy = Fixed(list(torch.tensor(asked).float().view(2, rows, heads) - 0.5))
    ids, mask = tiny_prompts(*lengths)
    answer = tiny_prompts(*(2 for _ in lengths), seed=2)[0]
    pruner = Pruner(policy, Gate(bucket=bucket), fill=fill)
    answered, kept = [], []
    for execution in ("masked", "compact"):
        with attached(model, pruner, execution) as trace:
            answered.append(step_logits(model, ids, mask, answer))
            kept.append(torch.stack(trace.keep))
    assert kept[0].equal(kept[1])
    torch.testing.assert_close(answered[1], answered[0], atol=2e-5, rtol=1e-5)
