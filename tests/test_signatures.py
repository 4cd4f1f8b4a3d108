"""Concepts have one place each, as floors have: what is passed, how long functions are, who reads sizes."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_house import MODULES

PARTS = {"policy", "gate", "window", "fill", "budget", "signals", "units", "look", "scope", "path"}
MANY = ("cli", "execution.captured.kernels")  # options, addresses and strides: as many as there are
FACADE = "microglia.system.MicrogliaPruningSystem"  # makes a Pruner of its parts, so it takes them one by one
SIZES = (
    "num_attention_heads|num_key_value_heads|num_hidden_layers|hidden_size|intermediate_size|vocab_size|head_dim|"
    "max_position_embeddings|sliding_window|layer_types"
)
# A shape has no model yet; a Phi-3's configuration becomes a Mistral's; the code of an export reads its own.
READ_SIZES = ("anatomy", "benchmark.shapes", "export.unfused", "export.modeling_microglia")


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package by its dotted name."""
    for module, path in MODULES.items():
        yield from _inside(ast.parse(path.read_text(encoding="utf-8")), module)


def _inside(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner, child
        yield from _inside(child, inner)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {argument.arg for argument in every} - {"self", "cls"}


FUNCTIONS = list(functions())


def in_part(name: str, *parts: str) -> bool:
    return any(name.startswith(f"microglia.{part}") for part in parts)


def test_no_signature_takes_three_parts_of_a_pruner() -> None:
    taking = {name: parameters(function) & PARTS for name, function in FUNCTIONS}
    assert {n: p for n, p in taking.items() if len(p) > 2 and not n.startswith(FACADE)} == {}


def test_no_function_takes_more_than_eight_parameters() -> None:
    counts = {name: len(parameters(function)) for name, function in FUNCTIONS}
    assert {n: c for n, c in counts.items() if c > 8 and not n.startswith(FACADE) and not in_part(n, *MANY)} == {}


def test_no_function_is_longer_than_sixty_lines() -> None:
    lengths = {name: (function.end_lineno or 0) - function.lineno + 1 for name, function in FUNCTIONS}
    assert {n: c for n, c in lengths.items() if c > 60 and not in_part(n, "cli")} == {}


@pytest.mark.parametrize("module", MODULES)
def test_sizes_are_read_from_a_configuration_in_one_place(module: str) -> None:
    if in_part(module, *READ_SIZES):
        return
    source = MODULES[module].read_text(encoding="utf-8")
    read = rf"config\.({SIZES})\b|getattr\([\w.]*config[\w.()]*, \"({SIZES})\""
    assert re.findall(read, source) == []


def test_only_the_geometry_divides_by_a_number_of_heads() -> None:
    dividing = r"[^/]//\s*[\w.]*(heads|groups|head_dim|queries)\b|heads\s*//\s*\w"
    found = {name: re.findall(dividing, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    allowed = ("anatomy.geometry", "anatomy.layouts")
    assert {name: lines for name, lines in found.items() if lines and not in_part(name, *allowed)} == {}


def test_every_threshold_comes_from_a_budget() -> None:
    """Gates get a threshold from a Pruner, from a Budget's search, or as a checkpoint saved it."""
    searching = [name for name, function in FUNCTIONS if name.rpartition(".")[2] in ("threshold", "threshold_for")]
    assert searching == ["microglia.pruner.Budget.threshold"]
    given = []
    for module, path in MODULES.items():
        if in_part(module, "pruner", "checkpoint"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Gate", "replace"):
                values = [ast.unparse(k.value) for k in node.keywords if k.arg == "threshold"]
                given += [(module, value) for value in values if not re.fullmatch(r"[\w.]+\.threshold\(.*\)", value)]
    assert given == []
