"""What is frozen: the gate's decision on mean logits, as many heads as the prompts keep by themselves."""

from types import SimpleNamespace

import pytest
import torch

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.export import KeepPlan, accuracy_kept
from microglia.gate import Gate, keep_ratio
from microglia.policies import StaticPolicy
from microglia.pruner import Budget, Pruner
from microglia.tasks import Example, get_task
from tests.export.plans import uneven_plan
from tests.tiny import tiny_model, wild
from tests.tiny_folder import character_tokenizer

GEOMETRIES = [HeadGeometry(8, 8, 4), HeadGeometry(8, 4, 4)]
LOGITS = [torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def deciding(logits, gate):
    """A pruner whose budget are the logits of some prompts."""
    return Pruner(StaticPolicy.all_kept(GEOMETRIES), gate).with_budget(logits, GEOMETRIES)


@pytest.mark.parametrize("target", [0.4, 0.7, 0.9])
def test_the_best_heads_on_average_are_kept_as_many_as_the_budget_says(target):
    budget = Budget(LOGITS, GEOMETRIES, bucket=1)
    gate = Gate(threshold=budget.threshold(target), bucket=1)
    plan = KeepPlan.of_prompts("mean", deciding(LOGITS, gate))
    adaptive = keep_ratio([gate(x, g) for x, g in zip(LOGITS, GEOMETRIES, strict=True)])
    assert plan.adaptive_keep_ratio == pytest.approx(adaptive.mean().item())
    assert target - 1e-6 <= plan.adaptive_keep_ratio <= plan.keep_ratio <= target + 3 / 16  # whole groups are few
    first, kept = LOGITS[0].mean(0), plan.keep[0] > 0
    assert first[kept].min() > first[~kept].max() if not kept.all() else True
    for keep, geometry in zip(plan.keep, GEOMETRIES, strict=True):
        assert torch.equal(geometry.rectangle(keep[None] - 0.5, 1)[0], keep > 0)  # compaction takes nothing else
    assert plan.summary()["heads"][0] == kept.nonzero().flatten().tolist()


def test_a_prompt_is_frozen_as_it_is_decided():
    gate = Gate(threshold=0.2)
    one = [x[3:4] for x in LOGITS]
    plan = KeepPlan.of_prompt(deciding(one, gate))
    assert all(torch.equal(k, gate(x, g)[0]) for k, x, g in zip(plan.keep, one, GEOMETRIES, strict=True))
    assert plan.keep_ratio == plan.adaptive_keep_ratio


def test_no_prompts_make_no_plan():
    with pytest.raises(ConfigError, match="the plan 'mean' needs prompts, but there are none"):
        KeepPlan.of_prompts("mean", Pruner(StaticPolicy.all_kept(GEOMETRIES)))
    with pytest.raises(ConfigError, match="the plan 'task' needs prompts, but there are none"):
        KeepPlan.of_prompts("task", deciding([x[:0] for x in LOGITS], Gate()))


def test_accuracy_is_that_of_the_frozen_model_beside_dense_and_adaptive():
    model = tiny_model("llama", vocab_size=99, max_position_embeddings=512)
    tokenizer, plan = character_tokenizer(), uneven_plan(model)
    examples = [Example(str(i), f"{i} + {i} =", "", "", 1) for i in range(3)]
    texts = []

    def correct(example, text):
        texts.append(text)
        return len(texts) % 2 == 0

    task = SimpleNamespace(name="judged", template=get_task("arithmetic").template, correct=correct)
    setup = Setup(model, tokenizer, task, examples, max_new_tokens=4, batch_size=2)
    found = accuracy_kept(setup, plan, wild(model, gate=Gate()))
    assert [getattr(found, name).prompts for name in ("dense", "adaptive", "frozen")] == [3, 3, 3]
    assert found.dense.sparsity == 0
    assert found.frozen.sparsity == pytest.approx(1 - plan.keep_ratio)
    assert found.paired.diff == pytest.approx(found.frozen.accuracy - found.dense.accuracy)
    assert texts[:3] != texts[6:]  # the frozen model wrote other texts than the dense one
