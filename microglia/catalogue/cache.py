"""The folder in which fetched files and dequantised models are kept, and how something gets there whole.

`downloads/NAME/` holds what was fetched, `models/STEM-SHA256/` a model as `save_pretrained` would write it and
`source.json`, which says what it was made from. The checksum is that of the file it came from: the same file under
another name is not dequantised again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from microglia.cache import cache_folder
from microglia.errors import MicrogliaError

SOURCE = "source.json"
DIGITS = 12  # of a checksum in the name of a folder; source.json has all of them


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def origin(folder: Path | str) -> dict[str, Any]:
    """What a model in the cache was made from; empty for any other folder."""
    with suppress(OSError, ValueError):
        row = json.loads((Path(folder) / SOURCE).read_text("utf-8"))
        if isinstance(row, dict) and "sha256" in row:
            return row
    return {}


def kept(sha256: str) -> Path | None:
    """The model that was made from the file with this checksum."""
    candidates = cache_folder("models").glob(f"*-{sha256[:DIGITS]}")
    return next((folder for folder in sorted(candidates) if origin(folder).get("sha256") == sha256), None)


def final(stem: str, sha256: str) -> Path:
    """Where the model made from the file with this checksum belongs."""
    return cache_folder("models") / f"{stem}-{sha256[:DIGITS]}"


def not_written(place: Path, error: OSError) -> MicrogliaError:
    """What to raise where the cache takes nothing more."""
    return MicrogliaError(
        f"{place} cannot be written ({error.strerror or error}); make room there, or name another folder in "
        "MICROGLIA_CACHE"
    )


@contextmanager
def made(stem: str, sha256: str, about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write a model into; when the block ends without an error it gets a source.json that says `about` and
    takes its place in the cache.

    Whatever is killed halfway leaves a folder that nobody reads and the next attempt removes.
    """
    place = final(stem, sha256)
    building, outdated = (place.with_name(f".{sha256[:DIGITS]}.{word}") for word in ("building", "outdated"))
    try:
        for folder in (building, outdated):
            shutil.rmtree(folder, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        (building / SOURCE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if place.exists():  # without a source.json, else it would have been taken
            os.replace(place, outdated)
        os.replace(building, place)
    except OSError as error:
        raise not_written(place, error) from error
    finally:
        for folder in (building, outdated):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time does what is called `name`; the others wait and then find it done."""
    folder = cache_folder("locks")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f"{name}.lock"
        lock.touch()
    except OSError as error:
        raise MicrogliaError(
            f"{folder} cannot be written ({error.strerror}); name another folder in MICROGLIA_CACHE"
        ) from error
    with WeakFileLock(lock):
        yield
