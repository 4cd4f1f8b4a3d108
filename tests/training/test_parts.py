"""Schedules, losses, batches: small pure parts against values worked by hand."""

import math

import pytest
import torch

from microglia.errors import ConfigError, DataError
from microglia.passes import Batch, collate, encode
from microglia.tasks.base import Example
from microglia.training import TrainingConfig
from microglia.training.loss import answer_losses, answer_tokens, divergences, gate_entropy
from microglia.training.schedule import scheduled
from tests.tiny_folder import character_tokenizer


@pytest.mark.parametrize(
    ("kind", "middle"), [("linear", 0.155), ("cosine", 0.155), ("exponential", math.sqrt(0.01 * 0.3))]
)
def test_schedules_start_and_end_at_their_ends(kind, middle):
    ends = (0.01, 0.3)
    assert scheduled(kind, ends, 0) == pytest.approx(0.01)
    assert scheduled(kind, ends, 0.5) == pytest.approx(middle)
    assert scheduled(kind, ends, 1) == pytest.approx(0.3)
    assert scheduled(kind, ends, 7) == pytest.approx(0.3)
    values = [scheduled(kind, ends, i / 20) for i in range(21)]
    assert values == sorted(values)


def test_cosine_is_slow_at_both_ends():
    assert scheduled("cosine", (0.0, 1.0), 0.25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_the_loss_of_an_answer_is_a_mean_over_its_own_tokens():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]], [[0.0, 3.0], [9.0, 0.0], [9.0, 0.0]]])
    labels = torch.tensor([[0, 1, -100], [0, -100, -100]])
    expected = [(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2, math.log(1 + math.exp(3))]
    assert answer_losses(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    assert answer_tokens(labels).tolist() == [2, 1]


def test_gate_entropy_is_the_binary_entropy_and_falls_when_gates_decide():
    logits = [torch.tensor([[0.0, 2.0, -60.0]])]
    p = 1 / (1 + math.exp(-4))
    expected = (math.log(2) - p * math.log(p) - (1 - p) * math.log(1 - p)) / 3
    assert gate_entropy(logits, temperature=0.5).item() == pytest.approx(expected, rel=1e-5)
    x = torch.tensor([[0.3, -0.3]], requires_grad=True)
    gate_entropy([x], 1.0).backward()
    assert x.grad[0, 0] < 0 < x.grad[0, 1]  # minimising it drives the gates away from 0.5


def test_distillation_is_zero_for_equal_logits_and_the_kl_otherwise():
    dense = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [1.0, 0.0]]])
    labels = torch.tensor([[1, -100], [0, 1]])
    assert divergences(dense.clone(), dense, labels).tolist() == pytest.approx([0, 0], abs=1e-7)

    def kl_to_even(row, place):
        p = torch.softmax(dense[row, place].double(), -1)
        return float((p * (p.log() - math.log(0.5))).sum())

    expected = [kl_to_even(0, 0), (kl_to_even(1, 0) + kl_to_even(1, 1)) / 2]
    assert divergences(torch.zeros_like(dense), dense, labels).tolist() == pytest.approx(expected, rel=1e-4)


def test_prompts_are_padded_left_and_answers_right():
    rows = [{"prompt": [5, 6], "answer": [7]}, {"prompt": [8], "answer": [9, 10, 11]}]
    batch = Batch(**collate(rows))
    assert batch.prompt.tolist() == [[5, 6], [0, 8]]
    assert batch.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.answer.tolist() == [[7, 0, 0], [9, 10, 11]]
    assert batch.labels.tolist() == [[7, -100, -100], [9, 10, 11]]


def test_training_text_is_what_generation_sees():
    tokenizer = character_tokenizer()
    example = Example("a", "What is 1 plus 2?", "result: 1 + 2 = 3\n#### 3", "3", 1)
    row = encode(tokenizer, [example], "Question: {question}\nAnswer:", None)[0]
    assert tokenizer.decode(row["prompt"]) == "Question: What is 1 plus 2?\nAnswer:"
    assert tokenizer.decode(row["answer"][:-1]) == " result: 1 + 2 = 3\n#### 3"
    assert row["answer"][-1] == tokenizer.eos_token_id


def test_an_example_that_does_not_fit_is_named():
    example = Example("long-one", "x" * 50, "#### 1", "1", 1)
    with pytest.raises(DataError, match=r"long-one has \d+ tokens .* context is 20"):
        encode(character_tokenizer(), [example], "{question}", 20)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schedule": "zigzag"}, "choose one of linear, cosine, exponential"),
        ({"loss_per": "prompt"}, "choose token or example"),
        ({"estimator": "hard"}, "choose straight-through or soft"),
        ({"lora": "always"}, "choose one of none, first, joint"),
        ({"keep_ratio": 1.2}, "above 0 and at most 1"),
        ({"batch_size": 0}, "batch_size=0 was given; it must be above 0"),
        ({"alpha": (0.1, -0.1)}, "not negative"),
        ({"alpha": (0.0, 0.3), "schedule": "exponential"}, "both ends above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan was given; it must be above 0"),
        ({"epochs": float("inf")}, "epochs=inf was given; it must be above 0"),
        ({"lora_steps": 0}, "lora_steps=0 was given; it must be above 0"),
        ({"target": "silver"}, r"target='silver' was given; choose model, gold or a weight between 0 and 1"),
        ({"target": "1.5"}, r"target='1\.5' was given; choose model, gold or a weight"),
        ({"recovery": 4, "lora": "joint"}, "recovery=4 was given with lora='joint'; leave one of them out"),
        ({"continuation_tokens": 0}, "continuation_tokens=0 was given; it must be above 0"),
        ({"beta": float("nan")}, "beta=nan was given; it must not be negative"),
        ({"patience": -1}, "patience=-1 was given; it must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps=-1 was given; it must not be negative"),
        ({"alpha": (float("nan"), 0.3)}, "two numbers, start and end, not negative"),
        ({"temperature": (1.0, 0.0)}, "both ends must be above 0"),
        ({"seed": -1}, r"seed=-1 was given; it must be at least 0 and below 2\*\*32"),
    ],
)
def test_wrong_options_get_a_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainingConfig(**options)
