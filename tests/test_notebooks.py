"""Notebooks call the library and hold no logic; what they store was printed by a whole run, without an error."""

import ast
import json
from pathlib import Path
from string import Template

import pytest

from tests.commands import check_command, command_lines

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
SHELL = "%%bash\nset -e\n"  # without it only the last command of a cell could fail


def cells(path: Path) -> list[tuple[str, dict]]:
    """Source and cell of every code cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [("".join(c["source"]), c) for c in notebook["cells"] if c["cell_type"] == "code"]


def python(source: str) -> ast.Module:
    return ast.parse("\n".join("    pass" if line.strip().startswith("%") else line for line in source.splitlines()))


def settings(path: Path, size: str) -> dict[str, str]:
    """The values that the notebook's variables have in its `small` or its `large` mode."""
    found = [
        ast.literal_eval(node.value)
        for source, _ in cells(path)
        if not source.startswith("%%")
        for node in ast.walk(python(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == size
    ]
    return found[0]


def test_the_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_and_computes_nothing_itself(path):
    for source, _ in cells(path):
        if source.startswith("%%"):
            assert source.startswith(SHELL), source
            assert [line for line in source.removeprefix(SHELL).splitlines() if not line.startswith("microglia ")] == []
        else:
            assert [type(node).__name__ for node in ast.walk(python(source)) if isinstance(node, LOGIC)] == [], source


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_commands_that_exist(path, size):
    values = settings(path, size)
    scripts = [Template(source).substitute(values) for source, _ in cells(path) if source.startswith("%%")]
    commands = [words for script in scripts for words in command_lines(script)]
    assert len(commands) >= 5
    for words in commands:
        check_command(words)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_modes_set_the_same_variables(path):
    assert settings(path, "small").keys() == settings(path, "large").keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_whole_run_without_an_error(path):
    counts = [cell["execution_count"] for _, cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run python scripts/run_notebooks.py --small --save"
    outputs = [output for _, cell in cells(path) for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    shell = [cell for source, cell in cells(path) if source.startswith("%%")]
    assert all("".join(cell["outputs"][0]["text"]).strip() for cell in shell)
