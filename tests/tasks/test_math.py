"""MATH and MATH-500: boxed answers, equality as mathematics, and every official solution gives its own answer."""

import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import equivalence, get_task
from microglia.tasks.equivalence import equivalent
from microglia.tasks.hendrycks_math import SUBJECTS, last_boxed
from tests.official import official

pytest.importorskip("math_verify", reason="math-verify is not installed (extra eval)")
OFFICIAL, needs_official = official("math")
TASK, TASK_500 = get_task("math"), get_task("math-500")
NOT_THEIR_OWN: set[str] = set()  # ids of official solutions that do not give their own answer: none


def row(number: int, **changes: object) -> dict[str, object]:
    solution = f"Twice is \\boxed{{wrong}} no, $\\boxed{{\\frac{{{number}}}{{2}}}}$."
    return {
        "problem": f"Half of {number}?",
        "solution": solution,
        "level": "Level 3",
        "type": "Algebra",
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 30), ("test", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)))
    return tmp_path


def test_an_example_is_read_as_it_will_be_learned(folder: Path) -> None:
    example = TASK.load("test", data_dir=folder)[3]
    assert example.id == "math/test/3"
    assert example.question == "Half of 3?\nPut the final answer in \\boxed{}."
    assert example.gold == "\\frac{3}{2}"
    assert (example.difficulty, example.family) == (3, "Algebra")
    assert len(TASK.load("train", data_dir=folder)) == 27
    assert len(TASK.load("validation", data_dir=folder)) == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{\\frac{1}{\\sqrt{2}}} or so", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2 and on", "1"),
        ("\\boxed 7.", "7"),
        ("\\fbox{7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("no box", None),
    ],
)
def test_the_last_closed_box_counts(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
        ("So the answer is 3.5.", "3.5"),
        ("which makes 12", "12"),
        ("nothing", None),
        ("<think>\\boxed{5}</think>\\boxed{4}", "4"),
        ("<think>\\boxed{5}", None),
        ("\\boxed{4}\n\nProblem: What is 2+3?\n\\boxed{5}", "4"),
    ],
)
def test_without_a_box_the_answer_is_what_is_said(text: str, found: str | None) -> None:
    assert TASK.extract(text) == found


@pytest.mark.parametrize(
    ("gold", "given", "equal"),
    [
        ("\\frac12", "0.5", True),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("3", "x = 3", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("[1,2]", "x \\in [1,2]", True),
        ("1,2", "2,1", True),
        ("(1,2)", "(2,1)", False),
        ("1000", "1,000", True),
        ("\\text{(C)}", "C", True),
        ("90^\\circ", "90", True),
        ("2", "3", False),
        ("\\sqrt{2}", "1.41", False),
        ("\\text{even}", "\\text{odd}", False),
        ("2", "", False),
        ("2", "\\frac{", False),
    ],
)
def test_equal_is_equal_as_mathematics(gold: str, given: str, equal: bool) -> None:
    assert equivalent(gold, given) is equal


def elsewhere(gold: str, given: str) -> bool:
    """What a thread other than the main one finds, which no signal reaches."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(equivalent(gold, given)), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "the comparison hangs"
    return found[0]


@pytest.mark.parametrize("where", [equivalent, elsewhere])
@pytest.mark.parametrize("endless", ["9^{9^{9}}", "9^{9^{9^{9}}}", "(10^9)!"])
def test_what_cannot_be_reckoned_is_given_up_wherever_it_is_compared(
    where: Callable[[str, str], bool], endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert where("\\frac12", "0.5")
    monkeypatch.setattr(equivalence, "SECONDS", 1)
    assert not where("2", endless)
    monkeypatch.undo()
    assert where("\\frac12", "0.5")


def test_a_child_that_died_is_replaced() -> None:
    assert equivalent("\\frac12", "0.5")
    assert equivalence.VERIFIER.process is not None
    equivalence.VERIFIER.process.kill()
    equivalence.VERIFIER.process.wait()
    equivalent("\\frac12", "0.5")
    assert equivalent("\\frac12", "0.5")


def test_the_archive_and_the_hub_give_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for subject in SUBJECTS:
        for number in range(3):
            path = tmp_path / "test" / subject / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row(number)))

    class Hub:
        @staticmethod
        def load_dataset(repository: str, name: str | None, *, split: str) -> list[dict[str, object]]:
            assert (repository, split) == ("EleutherAI/hendrycks_math", "test")
            assert name in SUBJECTS
            return [row(number) for number in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert TASK.load("test") == TASK.load("test", data_dir=tmp_path)
    assert TASK.load("test")[3].id == "math/test/counting_and_probability/0"


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"neither .*train\.jsonl nor a folder .*official archive"):
        TASK.load("train", data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"test\.jsonl, line 1 has no field 'answer'"):
        TASK_500.load("test", data_dir=folder)  # the whole of MATH is not MATH-500
    with pytest.raises(DataError, match=r"there is no file .*test\.jsonl; give MATH-500's folder"):
        TASK_500.load("test", data_dir=tmp_path / "nowhere")
    (folder / "test.jsonl").write_text(json.dumps(row(1, solution="no box")) + "\n")
    with pytest.raises(DataError, match=r"example test/0 of math needs a problem and a solution that boxes its answer"):
        TASK.load("test", data_dir=folder)
    with pytest.raises(ConfigError, match="task math-500 has no split 'train'; choose one of test"):
        TASK_500.load("train")
    monkeypatch.setattr(equivalence, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"math-verify, which is not installed; pip install 'microglia\[eval\]'"):
        TASK.load("test", data_dir=folder)


@needs_official
def test_every_official_solution_gives_its_own_answer() -> None:
    examples = TASK_500.load("test", data_dir=OFFICIAL)
    assert len(examples) == len({e.id for e in examples}) == 500
    assert {e.id for e in examples if TASK_500.extract(e.answer) != e.gold} == NOT_THEIR_OWN
    assert {e.id for e in examples if not TASK_500.correct(e, e.answer)} == NOT_THEIR_OWN
    assert {e.difficulty for e in examples} == {1, 2, 3, 4, 5}
    assert len({e.family for e in examples}) == 7
    whole = TASK.load("test", data_dir=OFFICIAL)
    assert len(whole) == 5000
    assert all(TASK.extract(e.answer) == e.gold for e in whole)


@needs_official
def test_math_verify_alone_agrees_and_tells_other_answers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "_plain", lambda answer: object())  # no shortcut by spelling
    examples = TASK_500.load("test", limit=150, data_dir=OFFICIAL)
    assert [e.id for e in examples if not equivalent(e.gold, e.gold)] == []
    others = [e.gold for e in examples]
    random.Random(0).shuffle(others)
    pairs = [(e.gold, other) for e, other in zip(examples, others, strict=True) if e.gold != other]
    assert [pair for pair in pairs if equivalent(*pair)] == []
