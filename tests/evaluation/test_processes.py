"""Two processes answer half of the batches each; what they merge is what one finds, number for number."""

import json
from dataclasses import replace

import pytest

from microglia import processes
from microglia.evaluation.choices import score_choices
from microglia.evaluation.run import evaluate
from microglia.gate import Gate
from microglia.results import plain
from microglia.tasks import get_task
from microglia.tasks.base import Choices, Example
from tests.pair import start_pair
from tests.tiny import tiny_model
from tests.tiny_folder import character_tokenizer, checkpoint_for

# Seven examples in batches of three: one process has two batches, the other one.
EXAMPLES = [
    Example(f"e{i}", question, "#### 3", "3", 1 + i % 3, choices=Choices(question, ("3", "four"), i % 2))
    for i, question in ((i, "Tom has 3 apples." + " And?" * i) for i in (3, 0, 6, 1, 5, 2, 4))
]


def found():
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    policy = checkpoint_for(model).policy
    steps = []
    for judge, options in ((evaluate, {"max_new_tokens": 5}), (score_choices, {})):
        run = judge(
            model,
            tokenizer,
            get_task("arithmetic"),
            EXAMPLES,
            policy,
            gate=Gate(bucket=1),
            batch_size=3,
            progress=lambda done, total: steps.append([done, total]),
            **options,
        )
        yield {"rows": run.rows(), **plain(replace(run.summary(), seconds=0.0))}
        assert run.seconds > 0
    assert steps[-1] == [14, 14] or not processes.is_first()


def write(folder):
    text = json.dumps(list(found()))
    (folder / f"{processes.rank()}.json").write_text(text)


@pytest.mark.slow
def test_a_shared_evaluation_merges_exactly(tmp_path):
    start_pair(write, tmp_path, preload=["tests.evaluation.test_processes"])
    alone = json.loads(json.dumps(list(found())))
    assert 0 < alone[0]["sparsity"] < 1
    assert [row["id"] for row in alone[0]["rows"]] == [example.id for example in EXAMPLES]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
