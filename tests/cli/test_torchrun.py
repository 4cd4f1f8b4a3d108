"""The scripts under torchrun: the same flags, one result on stdout, and the numbers of a single process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_folder import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "--max-steps 2 --limit 6 --batch-size 4 --eval-limit 2 --hidden-dim 16 --keep-ratio 0.6 --ramp 0 --json"
EVALUATE = "--limit 5 --batch-size 2 --max-new-tokens 3 --json"
TWO = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def script(name, *arguments, launcher=()):
    around = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", env=around, capture_output=True, text=True, timeout=600)


def only_json(result):
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.mark.slow
def test_two_processes_say_once_what_one_says(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    found = []
    for folder, launcher in ((tmp_path / "one", []), (tmp_path / "two", TWO)):
        place = ["--base_model", model, "--output_dir", folder, *TRAIN.split()]
        training = only_json(script("train", *place, launcher=launcher))["training"]
        place = ["--model_path", tmp_path / "one", "--output_dir", folder / "results", *EVALUATE.split()]
        result = only_json(script("evaluate", *place, launcher=launcher))
        answers = json.loads((folder / "results" / "answers-arithmetic.json").read_text())
        assert len((folder / "results" / "records.jsonl").read_text().splitlines()) == 11
        numbers = {name: training["last"][name] for name in ("task", "keep_ratio", "train_loss")}
        found.append((numbers, answers, {**result["pruned"], "seconds": 0}))
    (one, *exact), (two, *again) = found
    assert two == pytest.approx(one, rel=1e-4)
    assert again == exact


@pytest.mark.slow
def test_a_verb_for_one_process_says_so():
    result = script("benchmark", "--num_runs", 1, launcher=TWO)
    assert result.returncode != 0
    assert "microglia: benchmark works in one process; start it without torchrun" in result.stderr
    assert result.stdout == ""
