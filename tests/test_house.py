"""The order of the house: floors, names, sizes, the map in CONTRIBUTING.md, and an import that does nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import microglia

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "microglia"

# Prefix of a module's name → floor; the longest prefix wins. Imports point to lower floors or stay inside one prefix.
FLOORS = {
    "microglia.errors": 0,
    "microglia.cache": 0,
    "microglia.registry": 1,
    "microglia.store": 1,
    "microglia.processes": 1,
    "microglia.reasoner": 1,
    "microglia.catalogue": 1,
    "microglia.record": 2,
    "microglia.ledger": 2,
    "microglia.results": 2,
    "microglia.anatomy": 2,
    "microglia.models": 2,
    "microglia.tasks": 2,
    "microglia.units": 3,
    "microglia.signals": 4,
    "microglia.settings": 5,
    "microglia.gate": 5,
    "microglia.policies": 6,
    "microglia.recovery": 6,
    "microglia.pruner": 7,
    "microglia.execution": 8,
    "microglia.lease": 8,
    "microglia.checkpoint": 8,
    "microglia.attach": 9,
    "microglia.passes": 10,
    "microglia.reading": 11,
    "microglia.generation": 12,
    "microglia.explain": 12,
    "microglia.training": 13,
    "microglia.evaluation": 14,
    "microglia.benchmark": 15,
    "microglia.criteria": 15,
    "microglia.experiments": 16,
    "microglia.export": 17,
    "microglia.report": 17,
    "microglia.serving": 17,
    "microglia.system": 17,
    "microglia.harness": 18,
    "microglia.cli": 18,
    "microglia.__main__": 19,
}
ROOF = "microglia"
LONGEST_FILE = 400
DRAWERS = {"utils", "common", "helpers", "misc"}
NOT_OURS = {"build", "dist", "runs", "checkpoints", "__pycache__"}
# Put together here, so that this file does not contain what it forbids.
ONE_MACHINES_FOLDERS = ["/" + folder + "/" for folder in ("work", "root")]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scipy", "typer", "rich", "matplotlib"}


def python_files(folder: Path) -> list[Path]:
    """Every Python file under `folder` that belongs to the repository: no environments, caches or build products."""

    def ours(path: Path) -> bool:
        parents = path.relative_to(ROOT).parts[:-1]
        return not any(part in NOT_OURS or part.startswith(".") for part in parents)

    return sorted(path for path in folder.rglob("*.py") if ours(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(PACKAGE)}
REPOSITORY = python_files(ROOT)


def prefix_of(module: str) -> str | None:
    """The longest prefix in the table of floors that holds `module`."""
    return max((p for p in FLOORS if module == p or module.startswith(p + ".")), key=len, default=None)


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; relative ones resolved, `import_module` included."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    anchor = package.split(".")[: len(package.split(".")) - level + 1]
                    base = ".".join([*anchor, *([base] if base else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """One sentence for each import of `source` that does not point downward."""
    home = prefix_of(module)
    if home is None:
        return [f"{module} has no floor; add it to FLOORS"]
    sentences = []
    for line, target in imported(ast.parse(source), module, is_package=is_package):
        if target.split(".")[0] != ROOF or target == f"{ROOF}.__version__":
            continue
        there = prefix_of(target)
        if there is None:
            sentences.append(f"{module}:{line} imports {target}, which is the roof's or has no floor")
        elif there != home and FLOORS[there] >= FLOORS[home]:
            sentences.append(
                f"{module}:{line} (floor {FLOORS[home]}) imports {target} (floor {FLOORS[there]}); only lower floors"
            )
    return sentences


@pytest.mark.parametrize("module", [name for name in MODULES if name != ROOF])
def test_imports_point_downward(module: str) -> None:
    path = MODULES[module]
    source = path.read_text(encoding="utf-8")
    assert forbidden_imports(source, module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("microglia.gate", "import microglia.attach"),
        ("microglia.gate", "from microglia.policies import MicrogliaAgent"),
        ("microglia.gate", "from microglia import policies"),
        ("microglia.gate", "from microglia import MicrogliaPruningSystem"),
        ("microglia.gate", "import microglia"),
        ("microglia.gate", "from .policies import Policy"),
        ("microglia.anatomy.fused", "from ..policies import Policy"),
        ("microglia.anatomy.fused", "from .. import policies"),
        ("microglia.gate", "def late():\n    from microglia.system import MicrogliaPruningSystem"),
        ("microglia.gate", "if TYPE_CHECKING:\n    from microglia.policies import Policy"),
        ("microglia.gate", "importlib.import_module('microglia.cli.main')"),
        ("microglia.gatekeeper", ""),
    ],
)
def test_an_import_that_climbs_is_seen(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("microglia.gate", "from microglia.errors import MicrogliaError"),
        ("microglia.gate", "from .units import Geometry"),
        (
            "microglia.anatomy.fused",
            "from microglia.anatomy.separate import x\nfrom .separate import y\nfrom . import separate",
        ),
        ("microglia.cli.main", "from microglia import __version__, system"),
        ("microglia.gate", "import torch\nfrom transformers import AutoModel"),
    ],
)
def test_an_import_that_descends_is_let_through(module: str, source: str) -> None:
    assert forbidden_imports(source, module) == []


def test_a_package_resolves_its_relative_imports_against_itself() -> None:
    assert forbidden_imports("from .separate import x", "microglia.anatomy", is_package=True) == []
    assert len(forbidden_imports("from .separate import x", "microglia.anatomy", is_package=False)) == 1


@pytest.mark.parametrize("path", REPOSITORY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_names_a_folder_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [folder for folder in ONE_MACHINES_FOLDERS if folder in text] == []


def test_no_file_of_the_package_is_too_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = [path for path in REPOSITORY if DRAWERS & {*path.relative_to(ROOT).with_suffix("").parts}]
    assert names == []


# --- the table of floors and the map in CONTRIBUTING.md ---------------------------------------------------------------


CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def section_of(page: str, heading: str) -> str:
    """What stands between the heading `## heading` and the next one."""
    section = re.search(rf"^## {heading}[ \t]*$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return section[1] if section else ""


def floors_shown(page: str) -> dict[str, int]:
    """Module → floor, from the rows `| floor | `module`, … |` of the table under `## Floors`."""
    rows = re.findall(r"^\| *(\d+) *\|(.*)\|[ \t]*$", section_of(page, "Floors"), re.MULTILINE)
    return {f"{ROOF}.{name}": int(floor) for floor, names in rows for name in re.findall(r"`([\w.]+)`", names)}


def test_a_table_of_floors_is_read() -> None:
    page = (
        "## Floors\n\n| floor | modules |\n|---|---|\n| 0 | `errors` |\n| 1 | `gate`, `cli` |\n\n## Map\n| 2 | `x` |\n"
    )
    assert floors_shown(page) == {"microglia.errors": 0, "microglia.gate": 1, "microglia.cli": 1}


def test_the_table_of_floors_in_contributing_is_the_one_that_is_enforced() -> None:
    assert floors_shown(CONTRIBUTING.read_text(encoding="utf-8")) == FLOORS


def map_lines(page: str) -> list[str]:
    """The lines of the first fenced block under the heading `## Map`."""
    block = re.search(r"^```[^\n]*\n(.*?)^```", section_of(page, "Map"), re.MULTILINE | re.DOTALL)
    return block[1].splitlines() if block else []


def mapped(lines: list[str]) -> dict[str, str]:
    """Path from the root of the repository → role, for each line `[spaces]path[spaces]role` of a module or a folder.

    A line that stands further in than a folder above it lies in that folder, unless it spells its path from the root.
    """
    paths: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in lines:
        entry = re.match(r"^( *)([\w.-][\w./-]*?(?:\.py|/))(?: +(.*))?$", line)
        if entry is None:
            continue
        depth, path, role = len(entry[1]), entry[2], entry[3] or ""
        while parents and parents[-1][0] >= depth:
            parents.pop()
        if parents and not path.startswith(parents[-1][1]):
            path = parents[-1][1] + path
        if path.endswith("/"):
            parents.append((depth, path))
        paths[path] = role.strip()
    return paths


def contributing_map() -> dict[str, str]:
    paths = mapped(map_lines(CONTRIBUTING.read_text(encoding="utf-8")))
    assert paths, "CONTRIBUTING.md must hold a fenced block under the heading '## Map' with lines 'path  role'"
    return paths


def test_a_map_is_read_nested_or_flat() -> None:
    page = """
## Map

```text
README.md            not a module
microglia/           the package
  gate.py            logits → keep
  sites/             where heads live
    fused.py         Phi-3
  microglia/agent.py the agent
scripts/train.py     trains
```

## Next

```
other.py  no part of the map
```
"""
    assert mapped(map_lines(page)) == {
        "microglia/": "the package",
        "microglia/gate.py": "logits → keep",
        "microglia/sites/": "where heads live",
        "microglia/sites/fused.py": "Phi-3",
        "microglia/agent.py": "the agent",
        "scripts/train.py": "trains",
    }


def test_every_path_of_the_map_exists_and_has_a_role() -> None:
    paths = contributing_map()
    assert [
        path for path in paths if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ] == []
    assert [path for path, role in paths.items() if not role] == []


def test_the_map_shows_every_module_and_folder_of_the_package() -> None:
    modules = {f"microglia/{path.name}" for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    folders = {
        f"microglia/{Path(path).relative_to(PACKAGE).parts[0]}/" for path in MODULES.values() if path.parent != PACKAGE
    }
    assert sorted((modules | folders) - {*contributing_map()}) == []


# --- the roof --------------------------------------------------------------------------------------------------------


def test_importing_microglia_imports_nothing_heavy() -> None:
    script = "import sys, microglia; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "microglia" in loaded.split()
    assert sorted(HEAVY & {*loaded.split()}) == []


@pytest.mark.parametrize("name", [name for name in microglia.__all__ if name != "__version__"])
def test_a_public_name_is_served_by_its_home(name: str) -> None:
    value = getattr(microglia, name)
    assert value.__name__ == name
    assert name in dir(microglia)


def test_type_checkers_and_readers_see_the_same_public_names() -> None:
    tree = ast.parse(MODULES[ROOF].read_text(encoding="utf-8"))
    shown = {target for _, target in imported(tree, ROOF, is_package=True) if target.startswith("microglia.")}
    assert shown == {f"{home}.{name}" for name, home in microglia._HOMES.items()}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'prune_everything'.*MicrogliaPruningSystem"):
        _ = microglia.prune_everything


def test_the_citation_carries_the_version_of_the_package() -> None:
    assert f"\nversion: {microglia.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
