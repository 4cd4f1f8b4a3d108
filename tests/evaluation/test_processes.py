"""Two processes answer half of the batches each; what they merge is what one gets, number for number."""

import json
from dataclasses import replace

import pytest

from microglia import processes
from microglia.evaluation.choices import score_choices
from microglia.evaluation.run import evaluate
from microglia.evaluation.setup import Setup
from microglia.results import plain
from microglia.tasks import get_task
from microglia.tasks.base import Choices, Example
from tests.pair import start_pair
from tests.tiny import ONE, tiny_model
from tests.tiny_folder import character_tokenizer, opinionated_pruner

# Seven examples in batches of three: one process has two batches, the other one.
EXAMPLES = [
    Example(f"e{i}", question, "#### 3", "3", 1 + i % 3, choices=Choices(question, ("3", "four"), i % 2))
    for i, question in ((i, "Tom has 3 apples." + " And?" * i) for i in (3, 0, 6, 1, 5, 2, 4))
]


def evaluations():
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    pruner = opinionated_pruner(model, gate=ONE)
    setup = Setup(model, tokenizer, get_task("arithmetic"), EXAMPLES, batch_size=3, max_new_tokens=5)
    steps = []
    for judge in (evaluate, score_choices):
        run = judge(setup, pruner, progress=lambda done, total: steps.append([done, total]))
        yield {"rows": run.rows(), **plain(replace(run.summary(), seconds=0.0))}
        assert run.seconds > 0
    assert steps[-1] == [14, 14] or not processes.is_first()


def write(folder):
    text = json.dumps(list(evaluations()))
    (folder / f"{processes.rank()}.json").write_text(text)


@pytest.mark.slow
def test_a_shared_evaluation_merges_exactly(tmp_path):
    start_pair(write, tmp_path, preload=["tests.evaluation.test_processes"])
    alone = json.loads(json.dumps(list(evaluations())))
    assert 0 < alone[0]["sparsity"] < 1
    assert [row["id"] for row in alone[0]["rows"]] == [example.id for example in EXAMPLES]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
