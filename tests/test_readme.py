"""The README's code runs, and its figures are those of the records."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SMALLER = {"limit=8000": "limit=24", "limit=500": "limit=6, max_new_tokens=24"}  # the same calls, in seconds


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    exec(compile(block, "README.md", "exec"), {})


def test_every_shrunken_call_is_still_in_the_readme():
    assert all(large in README for large in SMALLER)


def test_figures_are_those_of_the_records():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "update_figures.py", "--check"], check=False)
    assert done.returncode == 0, "run python scripts/update_figures.py"
