"""Errors form one family; records survive the disk, and damaged ones are named by file and line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from microglia import errors, record
from microglia.errors import CheckpointError, ConfigError, DataError, MicrogliaError, UnsupportedModelError
from microglia.record import Record, append_records, circumstances, read_records
from tests.full_disk import room_for

FULL = Record(
    name="decode_latency",
    value=12.5,
    unit="ms",
    p20=12.0,
    p80=13.25,
    n=50,
    seed=3,
    device="a device (cpu, 2 threads)",
    versions={"python": "3.11.0"},
    commit="0123abc",
    command="microglia benchmark --num-runs 50",
    extra={"keep_ratio": 0.75, "note": "α → 0.3"},
)


@pytest.mark.parametrize("kind", [UnsupportedModelError, CheckpointError, ConfigError, DataError])
def test_every_error_is_caught_as_ours(kind: type[MicrogliaError]) -> None:
    with pytest.raises(MicrogliaError, match="what to do"):
        raise kind("what to do")


def test_only_a_config_error_is_a_value_error() -> None:
    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, MicrogliaError)]
    assert [e for e in ours if issubclass(e, ValueError)] == [ConfigError]


def test_records_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "records.jsonl"
    append_records(path, [FULL])
    append_records(path, [Record("accuracy", 0.5, "ratio"), FULL])
    assert read_records(path) == [FULL, Record("accuracy", 0.5, "ratio"), FULL]
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [
        "decode_latency",
        "accuracy",
        "decode_latency",
    ]


def test_line_separators_inside_a_text_do_not_split_a_record(tmp_path: Path) -> None:
    odd = Record("x", 1.0, "ms", extra={"note": "a\nb\u2028c\x85d"})
    append_records(tmp_path / "r.jsonl", [odd])
    assert read_records(tmp_path / "r.jsonl") == [odd]


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError):
        FULL.value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("bad", [Record("bad", math.nan, "ms"), Record("bad", 1.0, "ms", extra={"tensor": object()})])
def test_all_records_are_written_or_none(tmp_path: Path, bad: Record) -> None:
    path = tmp_path / "r.jsonl"
    append_records(path, [FULL])
    before = path.read_bytes()
    with pytest.raises(DataError, match="'bad' cannot be written as JSON"):
        append_records(path, [FULL, bad])
    assert path.read_bytes() == before


def test_a_line_that_was_cut_off_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"name": "decode_la')
    append_records(path, [FULL])
    assert json.loads(path.read_text().splitlines()[1])["value"] == 12.5
    assert read_records(path) == [FULL]


def test_a_full_disk_leaves_the_records_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [Record("first", 1.0, "ms")])
    before = path.read_bytes()
    with (
        room_for(len(before) + 50),
        pytest.raises(DataError, match=r"records\.jsonl cannot be written \(File too large"),
    ):
        append_records(path, [Record("second", 2.0, "ms"), Record("third", 3.0, "ms")])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("never mind", "line 3 is not a JSON object"),
        ("[1, 2]", "line 3 is not a JSON object"),
        ('{"name": "x", "value": 1}', "line 3 has no unit"),
        ('{"name": "x", "value": 1, "unit": "ms", "colour": 2}', "line 3 has the unknown field colour"),
        ('{"name": "x", "value": "fast", "unit": "ms"}', "line 3 has the value 'fast', which is not a number"),
        ('{"name": "x", "value": true, "unit": "ms"}', "line 3 has the value True"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    append_records(path, [FULL])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"r\.jsonl, {message}"):
        read_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read \(No such file or directory\)"):
        read_records(tmp_path / "nothing.jsonl")


def test_circumstances_complete_a_record(tmp_path: Path) -> None:
    made = Record("x", 1.0, "ms", **circumstances("cpu"))
    assert f"{torch.get_num_threads()} threads" in made.device
    assert made.versions["torch"] == torch.__version__
    assert made.versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert made.versions["transformers"][0].isdigit()
    append_records(tmp_path / "r.jsonl", [made])
    assert read_records(tmp_path / "r.jsonl") == [made]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_tells_whether_the_package_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert record._commit(package) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert record._commit(package) is None  # untracked: somebody else's checkout around an installed package
    git(tmp_path, "add", ".")
    assert record._commit(package) is None  # tracked, but nothing committed yet
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert record._commit(package) == commit
    (tmp_path / "results.jsonl").write_text("outside the package")
    assert record._commit(package) == commit
    (package / "__init__.py").write_text("x = 1\n")
    assert record._commit(package) == f"{commit}+changed"


def test_the_command_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bin_folder = Path(sys.executable).parent
    typed = [str(bin_folder / "python"), str(bin_folder / "microglia"), "train", "--note", "two words"]
    assert record._command(typed) == "microglia train --note 'two words'"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert record._command([".venv/bin/python", ".venv/bin/microglia", "train"]) == "microglia train"
    assert record._command(["python", "-m", "microglia", "train"]) == "python -m microglia train"
    assert record._command(["/usr/bin/python3", str(tmp_path / "scripts/x.py")]) == "python3 scripts/x.py"
    assert record._command(["python"]) == "python"
