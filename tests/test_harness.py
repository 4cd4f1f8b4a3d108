"""lm-evaluation-harness on a checkpoint: dense as its own `hf`, pruned as our own numbers on the same prompts."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from microglia.errors import ConfigError, MicrogliaError
from microglia.evaluation.choices import score_choices
from microglia.evaluation.likelihood import encode_pair, likelihoods
from microglia.evaluation.setup import Setup
from microglia.export import KeepPlan, export
from microglia.export.frozen import frozen
from microglia.generation import generate
from microglia.reading import read_prompts
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from tests.tiny import geometries_of
from tests.tiny_folder import opinionated, save_tiny_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ROWS = [
    ("Which of these is a metal?", ["water", "old iron", "wood and paper"], 1),
    ("Where do most of the fish in the world live?", ["in trees", "in the sea", "on roofs"], 1),
    ("What is frozen water?", ["ice", "steam"], 0),
    ("What do plants need to make their own food?", ["light", "music", "a kitchen", "sand"], 0),
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{texts}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "say": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{texts[gold]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files, data in lm_eval's and in ARC's own form, and a checkpoint."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [{"question": q, "texts": t, "gold": g} for q, t, g in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        task = f"task: tiny_{name}{COMMON.format(data=folder / 'rows.jsonl')}{text}"
        (folder / "tasks" / f"{name}.yaml").write_text(task)
    arc = [
        {
            "id": str(number),
            "question": {"stem": q, "choices": [{"text": t, "label": "ABCD"[i]} for i, t in enumerate(texts)]},
            "answerKey": "ABCD"[gold],
        }
        for number, (q, texts, gold) in enumerate(ROWS)
    ]
    (folder / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arc))
    save_tiny_model(folder / "model")
    system = MicrogliaPruningSystem(str(folder / "model"), hidden_dim=16)
    opinionated(system.pruner.policy)
    system.set_keep_ratio(None, [q for q, *_ in ROWS])
    system.save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def system(folder) -> MicrogliaPruningSystem:
    return MicrogliaPruningSystem.from_pretrained(folder / "checkpoint")


@pytest.fixture
def judged(folder, monkeypatch):
    """A function (model, arguments, tasks) → what lm_eval found, with every sample."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    import_module("microglia.harness")  # which registers the model
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # It asks pip for everything that is installed, which takes longer than all the rest.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def judge(model, arguments, *tasks):
        return simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[f"tiny_{task}" for task in tasks],
            batch_size=3,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
        )

    return judge


def responses(result, task):
    samples = sorted(result["samples"][f"tiny_{task}"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_dense_is_what_the_harness_says_of_the_model_itself(judged, folder):
    ours = judged("microglia", f"checkpoint={folder / 'checkpoint'},execution=dense", *TASKS)
    theirs = judged("hf", f"pretrained={folder / 'model'},dtype=float32", *TASKS)
    assert responses(ours, "say") == responses(theirs, "say")
    for mine, its in zip(responses(ours, "choose"), responses(theirs, "choose"), strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in its]
        assert [x for x, _ in mine] == pytest.approx([x for x, _ in its], abs=1e-3)
    for mine, its in zip(responses(ours, "read"), responses(theirs, "read"), strict=True):
        assert mine == pytest.approx(its, abs=1e-3)
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["tiny_choose"][metric] == theirs["results"]["tiny_choose"][metric]
    assert ours["config"]["microglia_sparsity"] == 0


def test_stock_hf_evaluates_an_exported_folder(judged, folder, system, tmp_path):
    pruner = system.pruner.at(0.6)
    logits = read_prompts(system.model, system.tokenizer, [q for q, *_ in ROWS], pruner).logits
    plan = KeepPlan.of_prompts("task", pruner.with_budget(logits, geometries_of(system.model)))
    exported = export(system.model, system.tokenizer, plan, tmp_path / "exported")
    result = judged("hf", f"pretrained={exported.folder},trust_remote_code=True,dtype=float32", "choose", "say")
    prompts = [f"Question: {q}\nAnswer:" for q, *_ in ROWS]
    dense = generate(system.model, system.tokenizer, prompts, None, max_new_tokens=12).texts
    with frozen(system.model, plan) as small:
        texts = generate(small, system.tokenizer, prompts, None, max_new_tokens=12).texts
        pairs = [
            [encode_pair(system.tokenizer, p, f" {t}") for t in row[1]] for p, row in zip(prompts, ROWS, strict=True)
        ]
        expected = [likelihoods(small, row) for row in pairs]
    assert [[text] for text in texts] == [list(said) for said in responses(result, "say")]
    assert texts != dense  # so the plan made a difference
    for theirs, ours in zip(responses(result, "choose"), expected, strict=True):
        assert [x for x, _ in theirs] == pytest.approx([x.log_probability for x in ours], abs=1e-3)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_pruned_is_what_we_say_on_the_same_prompts(judged, folder, system, execution):
    arguments = {"checkpoint": str(folder / "checkpoint"), "execution": execution, "keep_ratio": 0.6}
    result = judged("microglia", arguments, "choose", "say")
    pruner = system.pruner.at(0.6)
    assert 0.2 < result["config"]["microglia_sparsity"] < 0.6

    prompts = [f"Question: {q}\nAnswer:" for q, *_ in ROWS]
    parts = (system.model, system.tokenizer, prompts, pruner)
    texts = generate(*parts, max_new_tokens=12, execution=execution).texts
    assert [[text] for text in texts] == [list(said) for said in responses(result, "say")]

    task = get_task("arc-easy")
    setup = Setup(system.model, system.tokenizer, task, task.load("test", data_dir=folder), execution)
    for metric, scoring in (("acc", "likelihood"), ("acc_norm", "likelihood-per-character")):
        evaluation = score_choices(setup, pruner, scoring)
        assert result["results"]["tiny_choose"][f"{metric},none"] == evaluation.accuracy
    for theirs, answer in zip(responses(result, "choose"), evaluation.answers, strict=True):
        assert [x for x, _ in theirs] == pytest.approx(answer.choices, abs=1e-3)
    dense = score_choices(setup)
    assert dense.answers[0].choices != pytest.approx(
        evaluation.answers[0].choices, abs=1e-2
    )  # so pruning made a difference


def test_captured_steps_write_what_compact_ones_do_and_score_nothing(judged, folder):
    arguments = {"checkpoint": str(folder / "checkpoint"), "keep_ratio": 0.6}
    compact, captured = (
        judged("microglia", {**arguments, "execution": execution}, "say") for execution in ("compact", "captured")
    )
    assert responses(captured, "say") == responses(compact, "say")
    assert captured["config"]["microglia_sparsity"] == compact["config"]["microglia_sparsity"] > 0.2
    with pytest.raises(ConfigError, match=r"execution='captured' scores no texts; choose compact, dense or masked"):
        judged("microglia", {**arguments, "execution": "captured"}, "choose")


def test_a_context_that_is_too_long_loses_its_beginning(folder, system):
    from microglia.harness import MicrogliaLM

    lm = MicrogliaLM(system, max_length=40)
    context, text = "x" * 90 + " Question: which is it?", " this one"
    scored = lm._loglikelihood_tokens([(None, *encode_pair(system.tokenizer, context, text))])
    cut = encode_pair(system.tokenizer, context[-(41 - len(text)) :], text)
    (expected,) = likelihoods(system.model, [cut], system.pruner)
    assert scored == [(pytest.approx(expected.log_probability, abs=1e-3), expected.greedy)]


def test_what_cannot_be_asked_is_refused_in_a_sentence(judged, folder, system):
    from microglia.harness import MicrogliaLM

    with pytest.raises(ConfigError, match=r"nothing to decide on.*execution=dense"):
        judged("microglia", {"checkpoint": system}, "read")
    with pytest.raises(
        ConfigError, match=r"execution='quick' is unknown; choose captured, compact, fast, dense or masked"
    ):
        MicrogliaLM(system, execution="quick")
    with pytest.raises(ConfigError, match=r"batch_size='auto' was given; give a number"):
        MicrogliaLM(system, batch_size="auto")
    with pytest.raises(MicrogliaError, match=r"there is no checkpoint folder"):
        MicrogliaLM("nowhere/at/all")


@pytest.mark.slow
def test_the_module_is_lm_eval_with_one_more_model(judged, folder, monkeypatch, tmp_path):
    from microglia.harness import main

    flags = (
        f"run --model microglia --model_args checkpoint={folder / 'checkpoint'},execution=masked --tasks tiny_choose"
    )
    more = f"--include_path {folder / 'tasks'} --limit 2 --device cpu --output_path {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["microglia.harness", *flags.split(), *more.split()])
    main()
    (written,) = tmp_path.rglob("results*.json")
    assert json.loads(written.read_text())["config"]["microglia_execution"] == "masked"
    assert torch.is_grad_enabled()
