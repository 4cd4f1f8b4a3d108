"""`microglia serve` as a process: says where it is, answers, and ends by a signal with its totals."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI
from typer.testing import CliRunner

from microglia.cli.main import app
from microglia.errors import ConfigError
from microglia.system import MicrogliaPruningSystem
from tests.tiny_folder import opinionated, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    system = MicrogliaPruningSystem(save_tiny_model(folder / "model"), hidden_dim=16)
    opinionated(system.pruner.policy)
    system.set_keep_ratio(0.7, ["1 + 1 =", "How many pens are left?"])
    return system.save_pretrained(folder / "tiny-pruned"), system


@contextmanager
def process(folder, *flags, **environment):
    """`microglia serve` as a process, and where it says that it is."""
    verb = ["serve", str(folder), "--port", "0", "--json", *flags]
    command = [sys.executable, "-c", "from microglia.cli.main import app; app()", *verb]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True) as server:
        try:
            said = server.stderr.readline()
            place = r"microglia: serving tiny-pruned at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C stops\)\n"
            found = re.fullmatch(place, said)
            assert found, said + server.stderr.read()
            yield server, found[1]
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])  # Ctrl-C, and what service managers and containers send
def test_a_process_serves_until_a_signal(checkpoint, name):
    folder, system = checkpoint
    with process(folder) as (server, url):
        with OpenAI(base_url=url, api_key="none", timeout=300) as client:
            message = {"role": "user", "content": "1 + 1 ="}
            answer = client.chat.completions.create(model="tiny-pruned", messages=[message], max_tokens=5)
        assert answer.choices[0].message.content.strip() == system.generate("1 + 1 =", 5)
        assert answer.usage.sparsity == pytest.approx(system.get_sparsity())
        server.send_signal(getattr(signal, name))
        stdout, stderr = server.communicate(timeout=300)
    assert (server.returncode, stderr) == (0, "microglia: stopped; every running answer was finished\n")
    assert json.loads(stdout)["answers"] in ({"stop": 0, "length": 1, "cut": 0}, {"stop": 1, "length": 0, "cut": 0})


@pytest.mark.slow
def test_what_the_grace_cuts_off_is_said(checkpoint):
    with process(checkpoint[0], "--grace", "0") as (server, url), OpenAI(base_url=url, api_key="none") as client:
        prompts = [f"{n} + {n} =" for n in range(16)]
        stream = client.completions.create(model="tiny-pruned", prompt=prompts, max_tokens=1000, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        stdout, stderr = server.communicate(timeout=300)
    assert (server.returncode, stderr) == (0, "microglia: stopped; running answers cut off: 1\n")
    assert json.loads(stdout)["answers"]["cut"] > 0


@pytest.mark.slow
def test_a_key_from_a_file_that_ends_in_a_line_break_matches(checkpoint):
    with process(checkpoint[0], MICROGLIA_API_KEY="sesame\n") as (_, url):
        with OpenAI(base_url=url, api_key="sesame") as client:
            assert client.models.list().data[0].id == "tiny-pruned"
        with OpenAI(base_url=url, api_key="none") as client, pytest.raises(AuthenticationError):
            client.models.list()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("nowhere/", "there is no checkpoint folder nowhere/"),
        ("x --host 0.0.0.0", "can be reached from other machines and there is no API key"),
        ("x --max-batch 0", "max_batch=0 was given; it must be at least 1"),
        ("x --grace nan", "grace=nan was given; it must be a number of seconds, 0 or more"),
        ("x --grace -1", "grace=-1.0 was given; it must be a number of seconds, 0 or more"),
        ("x --execution nope", "execution='nope' is unknown; choose captured, compact, fast, dense or masked"),
        ("x --path nope", "execution='nope' is unknown; choose captured, compact, fast, dense or masked"),
        ("x --batch-by luck", "'--batch-by': 'luck' is not one of 'settings', 'decision', 'mask'"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(flags, sentence, monkeypatch):
    monkeypatch.delenv("MICROGLIA_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["serve", *flags.split()])
    assert result.exit_code == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_share_of_the_bytes_is_set_before_anything_is_served(checkpoint, monkeypatch):
    served = []

    def stops(model, tokenizer, pruner, *rest):
        served.append(pruner.gate.threshold)
        raise ConfigError("seen enough")

    monkeypatch.setattr("microglia.serving.model.PrunedModel", stops)
    for flags in (["--bytes", "0.97"], ["--keep-ratio", "0.9"]):
        assert "seen enough" in CliRunner().invoke(app, ["serve", str(checkpoint[0]), *flags]).stderr
    pruner = checkpoint[1].pruner
    assert served == [pruner.at(byte_share=0.97).gate.threshold, pruner.at(0.9).gate.threshold]
    refused = CliRunner().invoke(app, ["serve", str(checkpoint[0]), "--bytes", "0.97", "--keep-ratio", "0.9"])
    assert "bytes=0.97 was given beside keep_ratio=0.9; a budget is one of them" in refused.stderr


def test_without_the_web_libraries_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "microglia.serving.run", raising=False)
    result = CliRunner().invoke(app, ["serve", "x"])
    assert result.exit_code == 2
    assert "needs uvicorn, which is not installed; pip install 'microglia[serve]'" in result.stderr
