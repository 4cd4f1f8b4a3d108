"""The README's code runs from its top to its end, and figures on pages are those of the records."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SMALLER = {
    "max_steps=100, limit=1600": "max_steps=2, limit=32",
    "limit=500": "limit=6, max_new_tokens=24",
}  # in seconds


def test_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, "README.md", "exec"), names)
    assert "of the heads were pruned" in capsys.readouterr().out


def test_the_first_screen_is_installation_six_lines_one_table_and_two_commands():
    screen = README.partition("\n## ")[0]
    assert all(words in screen for words in ("pip install microglia", "\nmake demo ", "\nmake test "))
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 6
    assert screen.count("\n|---") == 1


def test_every_shrunken_call_is_still_in_the_readme():
    assert all(large in README for large in SMALLER)


def test_figures_are_those_of_the_records():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "update_figures.py", "--check"], check=False)
    assert done.returncode == 0, "run python scripts/update_figures.py"
