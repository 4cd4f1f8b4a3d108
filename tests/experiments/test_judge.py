"""Judging by everything a data set tells: figures against sums by hand, one data set or several, gone on or at once."""

import json
import math
from dataclasses import replace

import pytest
import torch

from microglia.errors import ConfigError, DataError
from microglia.evaluation.closeness import Closeness, closeness
from microglia.evaluation.run import Answer, Evaluation, evaluate
from microglia.evaluation.setup import Setup
from microglia.experiments.judge import closeness_figures, exact_prefixes, judge, result_of, together
from microglia.generation import generate
from microglia.ledger import Ledger
from microglia.results import from_json
from microglia.tasks import get_task
from microglia.tasks.base import Choices, Example
from microglia.tasks.prompts import example_prompt
from tests.tiny import ONE, tiny_model
from tests.tiny_folder import character_tokenizer, opinionated_pruner

TOKENIZER = character_tokenizer()
QUESTIONS = [
    "Tom has 3 apples.",
    "Ann buys 12 pens and gives 5 of them to Leo.",
    "1 + 1 =",
    "How many are left?",
    "2 x 3",
]
EXAMPLES = [
    Example(f"e{i}", q, "#### 3", "3", 1 + i % 2, choices=Choices(q, ("3", "four"), i % 2))
    for i, q in enumerate(QUESTIONS)
]


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=2048)


@pytest.fixture
def setup(model):
    return Setup(model, TOKENIZER, get_task("arithmetic"), EXAMPLES, batch_size=2, max_new_tokens=6)


def figures(judged) -> dict:
    return {figure.measure: figure for figure in judged.figures}


def test_generated_answers_are_judged_by_right_and_by_close(setup, model):
    pruner, steps = opinionated_pruner(model, gate=ONE), []
    judged = judge(setup, pruner, progress=lambda *at: steps.append(at))
    found = figures(judged)
    measures = ["accuracy", "kl", "top1", "perplexity", "unfinished", "exact_prefix", "same", "keep_ratio"]
    assert list(found) == measures
    prompts = [example_prompt(TOKENIZER, e, setup.task.template) for e in EXAMPLES]
    dense, pruned = [], []
    for prompt in prompts:
        for rows, at in ((dense, None), (pruned, pruner)):
            out = generate(model, TOKENIZER, [prompt], at, max_new_tokens=6)
            rows.append((out.tokens[0, : out.lengths[0]].tolist(), int(out.tokens[0, out.lengths[0] - 1]) == 1))
    prefixes = []
    for (a, _), (b, _) in zip(dense, pruned, strict=True):
        same = 0
        while same < min(len(a), len(b)) and a[same] == b[same]:
            same += 1
        prefixes.append(same)
    assert found["exact_prefix"].pruned == pytest.approx(sum(prefixes) / 5)
    assert found["exact_prefix"].dense == pytest.approx(sum(len(a) for a, _ in dense) / 5)
    assert found["same"].pruned == sum(a == b for (a, _), (b, _) in zip(dense, pruned, strict=True)) / 5
    assert found["unfinished"].pruned == pytest.approx(1 - sum(end for _, end in pruned) / 5)
    assert found["unfinished"].dense == pytest.approx(1 - sum(end for _, end in dense) / 5)
    ids = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    close = closeness(model, [(p, a) for p, (a, _) in zip(ids, dense, strict=True)], pruner)
    assert found["kl"].pruned == pytest.approx(sum(c.kl for c in close) / sum(c.tokens for c in close), rel=1e-3)
    assert found["kl"].pruned > 1e-4
    assert found["keep_ratio"].pruned == pytest.approx(1 - judged.runs["pruned"].sparsity)
    assert {name.partition(", ")[2] for name, *_ in steps} == {"pruned", "dense", "texts"}


def test_an_untouched_model_differs_in_nothing(setup, model):
    found = figures(judge(replace(setup, execution="dense"), opinionated_pruner(model)))
    assert (found["kl"].pruned, found["top1"].pruned, found["same"].pruned) == (0, 1, 1)
    assert found["perplexity"].pruned == found["perplexity"].dense
    assert found["exact_prefix"].pruned == found["exact_prefix"].dense
    assert found["accuracy"].difference.diff == 0


def test_figures_per_token_by_hand():
    rows = [
        Closeness(10, 1.0, 9, 20.0, 21.0, 0.5),
        Closeness(30, 6.0, 24, 15.0, 24.0, 0.5),
        Closeness(0, 0, 0, 0, 0, 1),
    ]
    found = {figure.measure: figure for figure in closeness_figures("x", rows)}
    assert (found["kl"].pruned, found["top1"].pruned, found["kl"].prompts) == (7 / 40, 33 / 40, 2)
    assert found["perplexity"].dense == pytest.approx(math.exp(35 / 40))
    assert found["perplexity"].pruned == pytest.approx(math.exp(45 / 40))
    low, high = found["kl"].difference.ci95
    assert (low, high) == pytest.approx((0.1, 0.2))  # of two prompts, each resample is one, the other or both
    assert found["top1"].difference.ci95 == pytest.approx((-0.2, -0.1))
    assert found["perplexity"].difference.ci95[0] < found["perplexity"].difference.diff
    with pytest.raises(DataError, match=r"every text has a single token"):
        closeness_figures("x", rows[2:])


def test_exact_prefixes_end_at_the_first_difference():
    def run(*answers):
        return Evaluation(tuple(Answer("", "", True, 1, 1, 0, "", tokens=tuple(a)) for a in answers), 1.0)

    dense = run([5, 6, 7], [5, 6], [5], [8, 9], [1, 2])
    assert exact_prefixes(dense, run([5, 6, 8], [5, 6], [6], [8], [1, 2, 3])) == [2, 2, 0, 1, 2]


def test_choices_are_judged_by_likelihood_where_the_task_says_so(setup, model):
    arc = replace(setup, task=get_task("arc-easy"))
    found = figures(judge(arc, opinionated_pruner(model)))
    assert list(found) == ["accuracy", "keep_ratio"]
    alone = judge(arc, opinionated_pruner(model), dense=False)
    assert [f.dense for f in alone.figures] == [None, None]


def test_given_texts_are_scored_and_nothing_is_written(model, tmp_path):
    (tmp_path / "x.txt").write_text("A quick fox jumps over lazy dogs. " * 30)
    task = get_task("text")
    setup = Setup(model, TOKENIZER, task, task.load("test", data_dir=tmp_path), max_new_tokens=4)
    judged = judge(setup, opinionated_pruner(model, gate=ONE))
    assert judged.runs == {}
    found = figures(judged)
    assert list(found) == ["kl", "top1", "perplexity", "keep_ratio"]
    (example,) = setup.examples
    ids, whole = (TOKENIZER(text)["input_ids"] for text in (example.question, example.question + example.answer))
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    losses = [-float(scores[place - 1, whole[place]]) for place in range(len(ids) + 1, len(whole))]
    assert found["perplexity"].dense == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_without_texts_the_dense_model_writes_them(model):
    task = get_task("text")
    setup = Setup(model, TOKENIZER, task, task.load("test", limit=3), max_new_tokens=5)
    judged = judge(setup, opinionated_pruner(model, gate=ONE))
    assert list(figures(judged)) == ["kl", "top1", "perplexity", "unfinished", "exact_prefix", "same", "keep_ratio"]
    with pytest.raises(ConfigError, match=r"task text has no right answers to count; choose scoring='text'"):
        judge(setup, opinionated_pruner(model), "generation")
    with pytest.raises(ConfigError, match=r"scoring='text' compares with the dense model, so it cannot be left out"):
        judge(setup, opinionated_pruner(model), dense=False)
    with pytest.raises(ConfigError, match=r"scoring='guess' is unknown; choose one of generation, likelihood"):
        judge(setup, opinionated_pruner(model), "guess")


def test_an_interrupted_run_goes_on_where_it_was(setup, model, tmp_path, monkeypatch):
    pruner, path = opinionated_pruner(model, gate=ONE), tmp_path / "ledger.jsonl"
    whole = judge(setup, pruner)
    calls, real = [], generate

    def stops(*given, **options):
        calls.append(len(given[2]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr("microglia.evaluation.run.generate", stops)
    with pytest.raises(KeyboardInterrupt):
        judge(setup, pruner, ledger=Ledger(path))
    again = judge(setup, pruner, ledger=Ledger(path))
    assert calls == [2, 2, 1, 2, 2, 2, 1]  # four batches were kept, the fifth begins anew
    assert [(f.measure, f.pruned) for f in again.figures] == [(f.measure, f.pruned) for f in whole.figures]
    assert [a.tokens for a in again.runs["dense"].answers] == [a.tokens for a in whole.runs["dense"].answers]
    assert again.runs["pruned"].heads == whole.runs["pruned"].heads
    judge(setup, pruner, ledger=Ledger(path))
    assert len(calls) == 7
    judge(replace(setup, max_new_tokens=5), pruner, ledger=Ledger(path))
    assert len(calls) == 13


def test_answers_at_the_limit_are_unfinished_and_judged_by_what_there_is(setup, model):
    for most, expected in ((1, 1.0), (6, None)):
        run = evaluate(replace(setup, max_new_tokens=most))
        ended = [a.tokens[-1] == TOKENIZER.eos_token_id for a in run.answers]
        assert [a.finished for a in run.answers] == ended
        assert run.unfinished == pytest.approx(1 - sum(ended) / 5)
        assert expected is None or run.unfinished == expected
        assert [a.new_tokens for a in run.answers] == [len(a.tokens) for a in run.answers]


def test_several_data_sets_are_one_result(setup, model):
    pruner, task = opinionated_pruner(model, gate=ONE), get_task("text")
    texts = Setup(model, TOKENIZER, task, task.load("test", limit=2), max_new_tokens=4)
    parts = {s.task.name: result_of(s, judge(s, pruner), "test", None) for s in (setup, texts)}
    result = together(parts)
    assert [f.dataset for f in result.figures] == ["arithmetic"] * 8 + ["text"] * 7
    assert result.evaluations["arithmetic"].accuracy == parts["arithmetic"].accuracy
    assert parts["arithmetic"].max_new_tokens == 6
    again = from_json(json.loads(json.dumps(result.to_json())))
    assert [f.pruned for f in again.figures] == [f.pruned for f in result.figures]
    assert again.evaluations["arithmetic"].pruned == result.evaluations["arithmetic"].pruned
