"""Notebooks call the library and hold no logic; what they store was printed by a whole run, without an error."""

import ast
import json
from pathlib import Path

import pytest

from microglia.cli.main import VERBS

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
NAMES = {"quick_demo", "rigorous_experiment", "complete_pipeline", "qwen2_5"}
# A notebook that defines, loops or computes does what belongs into the library.
LOGIC = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.For,
    ast.While,
    ast.With,
    ast.Try,
    ast.AugAssign,
)
ELSEWHERE = {"calibrate", "compare", "export"}  # verbs that notebooks use and that may not be in VERBS yet


def cells(path: Path) -> list[tuple[str, dict]]:
    """Source and cell of every code cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [("".join(c["source"]), c) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_and_computes_nothing_itself(path):
    for source, _ in cells(path):
        if source.startswith("%%bash"):
            continue
        python = "\n".join("    pass" if line.strip().startswith("%") else line for line in source.splitlines())
        found = [type(node).__name__ for node in ast.walk(ast.parse(python)) if isinstance(node, LOGIC)]
        assert found == [], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_verbs_that_exist(path):
    known = {verb.__name__ for verb in VERBS} | ELSEWHERE
    lines = [line.split() for source, _ in cells(path) for line in source.splitlines()]
    used = {line[1] for line in lines if line[:1] == ["microglia"]}
    assert used
    assert used <= known


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_whole_run_without_an_error(path):
    counts = [cell["execution_count"] for _, cell in cells(path)]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    outputs = [output for _, cell in cells(path) for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
