"""Print the lowest versions that pyproject.toml allows, as constraints for pip: what `make lowest` tests with.

With those of the extras `serve` and `cpu`. torch is left as constraints.txt has it: older versions come on PyPI only
with gigabytes of libraries for GPUs. So are the tools that the tests need.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AS_PINNED = {"torch"}
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "openai", "httpx2", "jsonschema"}


def lowest() -> list[str]:
    """`name==version` of every dependency, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["serve"] + extras["cpu"]
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+),<[\d.]+", text) for text in asked]
    pins = [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None and bound[1] not in AS_PINNED]
    if len(pins) + len(AS_PINNED) != len(bounds):
        raise SystemExit("pyproject.toml names a dependency without a lower and an upper bound; give it both")
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in pinned if line.split("==")[0] in AS_PINNED | TOOLS] + pins


if __name__ == "__main__":
    print("\n".join(lowest()))
