"""Local things need no network, HF_HUB_OFFLINE=1 is honoured, and code that comes with a model runs only if asked."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from microglia.errors import MicrogliaError
from microglia.models import load_model
from microglia.system import MicrogliaPruningSystem
from tests.tiny_folder import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def calls(monkeypatch):
    """Every name that is looked up and every address that is connected to; none gets through."""
    made = []

    def refused(*arguments, **_):
        made.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return made


def test_a_local_model_is_trained_saved_loaded_and_asked_without_a_network(calls, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    few = {"max_steps": 1, "batch_size": 2, "limit": 4, "eval_limit": 2, "lora": "joint", "lora_rank": 2}
    MicrogliaPruningSystem(model, hidden_dim=8).train(output_dir=tmp_path / "run", quiet=True, **few)
    system = MicrogliaPruningSystem.from_pretrained(tmp_path / "run")
    system.generate("1 + 1 =", 2)
    system.evaluate(limit=2, max_new_tokens=2)
    assert calls == []


OFFLINE = """
import json, socket
calls = []
def refused(*arguments, **_):
    calls.append(str(arguments[0]))
    raise OSError("no network")
socket.getaddrinfo = refused
from microglia.checkpoint import Checkpoint
from microglia.errors import MicrogliaError
from microglia.models import load_model
from microglia.tasks import get_task
said = []
for attempt in (load_model, Checkpoint.from_pretrained, lambda name: get_task("gsm8k").load("test", limit=1)):
    try:
        attempt("microglia-tests/nowhere")
    except MicrogliaError as error:
        said.append(str(error))
print(json.dumps([len(said), calls]))
"""


@pytest.mark.slow
def test_offline_nobody_is_asked(tmp_path):
    """A hub id that is not in the (empty) cache: one sentence each for model, checkpoint and data set."""
    around = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [3, []]


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "strange.py").write_text("import os\nos.mkdir('exploded')\n")
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MicrogliaError, match=r"no model could be found at .*model"):
        load_model(tmp_path / "model", device="cpu")
    assert not (tmp_path / "exploded").exists()
