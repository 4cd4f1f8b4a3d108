"""Files of a checkpoint: written so that a crash at any moment leaves a loadable one, read so that damage is seen.

Several files cannot be replaced in one step, so the configuration is the one that counts: it names the SHA-256 of the
others. New contents are first put beside the old ones under `name.<start of their SHA-256>`, then the configuration is
replaced, then they are moved into place. Whoever reads takes the file or the one beside it, whichever the
configuration means.
"""

import errno
import hashlib
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from microglia.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system: there, only one may write into a folder at a time
    fcntl = None  # type: ignore[assignment]

CONFIG = "microglia_config.json"
AGENTS = "agents.safetensors"
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # names and format are peft's
CARD = "README.md"
LARGEST_CONFIG, LARGEST_WEIGHTS = 2**24, 2**32  # bytes; agents of the largest models take a tenth of that
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_STAGED = re.compile(r"\.[0-9a-f]{16}")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, on disk when this returns; makes missing folders. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Names are on disk when this returns, too: a folder is a file of its own."""
    with suppress(OSError):  # some systems open no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: Path | str) -> None:
    """Make `folder` and raise CheckpointError unless files can be written into it: better known before than after."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(_unwritable(folder, error)) from error


def replace_all(
    folder: Path,
    contents: Mapping[str, bytes],
    configure: Callable[[dict[str, str]], bytes],
    card: bytes,
    outdated: set[str],
) -> None:
    """Make `contents` (name → bytes) the checkpoint in `folder`; `outdated` names go.

    `configure(checksums)` gives the configuration's bytes. A README.md that microglia did not write is left alone.
    Raises CheckpointError when it cannot be written; what was there before then still loads.
    """
    checksums = {name: checksum(data) for name, data in contents.items()}
    staged = {name: folder / f"{name}.{checksums[name][:16]}" for name in contents}
    try:
        with _alone_in(folder):
            for name, data in contents.items():
                write_atomically(staged[name], data)
            write_atomically(folder / CONFIG, configure(checksums))
            for name, path in staged.items():
                os.replace(path, folder / name)
                _sync_folder((folder / name).parent)
            if _is_ours(folder / CARD):
                write_atomically(folder / CARD, card)
            with suppress(OSError):
                _sweep(folder, outdated - contents.keys())
    except OSError as error:
        raise CheckpointError(_unwritable(folder, error)) from error


def _sweep(folder: Path, outdated: set[str]) -> None:
    """Remove the `outdated` names and what interrupted writers left beside the files."""
    for name in outdated:
        (folder / name).unlink(missing_ok=True)
    for name in (AGENTS, *ADAPTER):
        for path in (folder / name).parent.glob(f"{Path(name).name}.*"):
            if _STAGED.fullmatch(path.suffix):
                path.unlink(missing_ok=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes `folder`, and lets one writer into it at a time, whichever process or thread it is in."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: as good as it was without
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Makes `folder`. Inside, it is claimed, unless somebody else had done so: whether it is tells the value.

    The system ends a claim with the process that made it, however that ends. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks: as good as it was without
        yield free
    finally:
        os.close(descriptor)


def read_all(folder: Path, checksums: Mapping[str, str]) -> dict[str, bytes]:
    """The contents that `checksums` (name → SHA-256) mean. Raises CheckpointError when one is missing or damaged."""
    return {name: _read(folder, name, digest) for name, digest in checksums.items()}


def read_config(folder: Path) -> bytes:
    """The bytes of the configuration. Raises CheckpointError when `folder` holds no checkpoint."""
    try:
        return read_regular(folder / CONFIG, LARGEST_CONFIG)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {CONFIG}{_pickles(folder)}; give a folder that microglia train or save_pretrained wrote"
        ) from None
    except OSError as error:
        raise CheckpointError(_unreadable(folder / CONFIG, error)) from error


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError, too, for a pipe, a device or more than `most` bytes.

    A checkpoint may come from anywhere: what never ends, or says that it is larger than memory, is not begun.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes; at most {most} belong there")
    return path.read_bytes()


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    beside = folder / f"{name}.{digest[:16]}"
    size = None
    for candidate in (path, beside, path):  # the last again: another process may just have moved it there
        try:
            data = read_regular(candidate, LARGEST_CONFIG if name.endswith(".json") else LARGEST_WEIGHTS)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(_unreadable(candidate, error)) from error
        if checksum(data) == digest:
            return data
        size = len(data)
    if size is None:
        raise CheckpointError(
            f"{folder} lacks {name}{_pickles(path.parent)}; copy the whole folder again or train and save once more"
        )
    raise CheckpointError(
        f"{path} is damaged or belongs to another checkpoint: its {size} bytes have not the SHA-256 in {CONFIG}; "
        "copy the whole folder again or train and save once more"
    )


def _pickles(folder: Path) -> str:
    """A clause about files that are never loaded, when there are some."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    except OSError:
        return ""
    if not names:
        return ""
    return f" ({', '.join(names[:3])} may hold pickles, which run code when loaded, so microglia never reads them)"


def _is_ours(card: Path) -> bool:
    """Whether a model card may be written there: none yet, or one that microglia made."""
    if not card.exists():
        return True
    try:
        return b"library_name: microglia" in read_regular(card, LARGEST_CONFIG)[:2000]
    except OSError:
        return False


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror or error}); give a checkpoint that can"


def _unwritable(folder: Path | str, error: OSError) -> str:
    return f"nothing can be written to {folder} ({error.strerror or error}); choose another folder or mend that"
