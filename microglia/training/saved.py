"""What an interrupted run goes on from: folders that were written to their end, with checksums that show damage.

A run that is killed while it saves leaves a folder without checksums, which are written last. Resumed from there,
without its optimiser say, it would end with other weights; so it is passed over.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from microglia import processes
from microglia.checkpoint.files import checksum, claimed, write_atomically
from microglia.errors import CheckpointError, ConfigError, MicrogliaError, first_line
from microglia.training.trained import Trained

WEIGHTS, CHECKSUMS = "trained.safetensors", "sha256.json"
STAGE = "agents"  # the folder that every run has below its own, with the checkpoints of its last stage


@contextmanager
def alone_in(folder: Path, *, resume: bool) -> Iterator[None]:
    """While inside, the run has its folder for itself. Raises ConfigError when another run is writing there.

    Two runs in one folder would remove and replace each other's checkpoints, and neither could be resumed.
    """
    with ExitStack() as stack:
        # Where nothing can be resumed or written, nothing is made: the run itself says so.
        nothing_there = resume and not folder.is_dir()
        if not nothing_there and not processes.agreed(lambda: _claim(folder / STAGE, stack)):
            raise ConfigError(f"another run is writing to {folder}; wait for its end or give another folder")
        yield


def _claim(folder: Path, stack: ExitStack) -> bool:
    """Whether this process has `folder` for itself until the stack is closed."""
    try:
        return stack.enter_context(claimed(folder))
    except OSError:
        return True


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder`: it is whole now."""
    sums = {path.name: checksum(path.read_bytes()) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=2).encode() + b"\n")


def last_whole(folder: Path) -> Path | None:
    """The newest sealed checkpoint of a stage, None when there is none. The others are removed.

    Left where they are they would confuse transformers, which removes the checkpoints whose folders are oldest.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = int(json.loads((path / TRAINER_STATE_NAME).read_text())["global_step"])
            json.loads((path / CHECKSUMS).read_text())
            whole.append((step, path))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


def load_trained(trained: Trained, folder: Path) -> None:
    """Load what `PruningTrainer` saved. Raises CheckpointError when a file is missing, broken or of another run."""
    _check(folder)
    with readable(folder):
        state = load_file(folder / WEIGHTS)
    expected = trained.trained_state()
    if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in expected.items()}:
        raise CheckpointError(
            f"{folder} was written by a run with other agents or adapters; resume with the options of that run"
        )
    trained.load_state_dict(state, strict=False)


@contextmanager
def readable(folder: Path | str) -> Iterator[None]:
    """What goes wrong inside, while `folder` is read, becomes a CheckpointError."""
    try:
        yield
    except MicrogliaError:
        raise
    except Exception as error:  # torch, pickle, safetensors and the system raise their own kinds
        raise CheckpointError(f"{folder} cannot be read ({first_line(error)}); {_ADVICE}") from error


def _check(folder: Path) -> None:
    with readable(folder):
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, digest in sums.items():
            if checksum((folder / name).read_bytes()) != digest:
                raise CheckpointError(f"{folder / name} is damaged: it has not the SHA-256 in {CHECKSUMS}; {_ADVICE}")


_ADVICE = "remove that folder and resume from an earlier checkpoint"
