"""What a run goes on from: unfinished saves are passed over, damage is named, nothing pickled is run."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from microglia.errors import CheckpointError, ConfigError, MicrogliaError
from microglia.training.saved import CHECKSUMS, seal
from tests.full_disk import room_for
from tests.tiny import tiny_model
from tests.tiny_folder import character_tokenizer
from tests.training.test_training import SHORT, same, tiny_run, trained_policy

STATE, WEIGHTS = "trainer_state.json", "trained.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of six steps, saved after three and six, and what came of it."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, trained_policy(folder, SHORT)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.mark.parametrize("left", ["weights only", "no optimiser", "half a state", "no checksums"])
def test_a_checkpoint_that_was_not_finished_is_passed_over(finished, run, left):
    """What a run leaves that is killed while it saves: weights come first, the state late, the checksums last."""
    last = run / "agents" / "checkpoint-6"
    (last / CHECKSUMS).unlink()
    if left == "half a state":
        state = (last / STATE).read_text()
        (last / STATE).write_text(state[: len(state) // 2])
    if left in ("weights only", "no optimiser"):
        (last / STATE).unlink()
        (last / "optimizer.pt").unlink()
    weights = load_file(last / WEIGHTS)
    save_file({name: x + 1 for name, x in weights.items()}, last / WEIGHTS)
    assert same(finished[1], trained_policy(run, SHORT, resume=True))


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "gone"])
def test_damage_is_named(run, name, damage):
    path = run / "agents" / "checkpoint-6" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "a bit flipped" else data[:40])
    if damage == "gone":
        path.unlink()
    sentence = r"cannot be read \(.*No such file" if damage == "gone" else rf"{name} is damaged: it has not the SHA-256"
    with pytest.raises(CheckpointError, match=sentence + r".*; remove that folder and resume from an earlier"):
        tiny_run(run, SHORT, resume=True)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_is_never_run(run, monkeypatch, name):
    monkeypatch.chdir(run)
    shutil.rmtree(run / "agents" / "checkpoint-6")
    unfinished = run / "agents" / "checkpoint-3"
    (unfinished / name).write_bytes(pickle.dumps(Bomb()))
    seal(unfinished)  # by somebody who knows how
    with pytest.raises(CheckpointError, match="checkpoint-3 cannot be read"):
        tiny_run(run, SHORT, resume=True)
    assert not (run / "exploded").exists()


@pytest.mark.parametrize("size", [2000, 6000])
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(finished, tmp_path, size):
    """The weights have no room (a file of 3 kB), or the optimiser has none (one of 10 kB)."""
    with room_for(size), pytest.raises(MicrogliaError, match=r"checkpoint-3 cannot be written .* with --resume"):
        tiny_run(tmp_path, SHORT)
    assert same(finished[1], trained_policy(tmp_path, SHORT, resume=True))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MicrogliaError, match=r"file.*training_config\.json cannot be written .* another folder"):
        tiny_run(tmp_path / "file" / "below", SHORT)


def test_two_runs_do_not_write_to_one_folder(finished, tmp_path):
    """Before the first checkpoint and after it, afresh and with --resume: the second is refused, the first goes on."""
    model = tiny_model("llama", vocab_size=len(character_tokenizer()), max_position_embeddings=2048)
    refused = []

    def second(*_):
        if refused_at := {2: "before", 10: "after"}.get(len(passes)):
            for resume in (False, True):
                other = replace(SHORT, seed=1)
                sentence = r"another run is writing to .*; wait for its end or give another folder"
                # the random numbers are this process's, and the first run goes on drawing them
                with torch.random.fork_rng(), pytest.raises(ConfigError, match=sentence):
                    tiny_run(tmp_path, other if refused_at == "before" else SHORT, resume=resume)
                refused.append(refused_at)
        passes.append(1)

    passes = []
    hook = model.model.layers[0].register_forward_hook(second)
    policy = trained_policy(tmp_path, SHORT, model=model)
    hook.remove()
    assert refused == ["before", "before", "after", "after"]
    assert same(finished[1], policy)
    assert same(finished[1], trained_policy(tmp_path, SHORT, resume=True))


def test_every_file_has_a_checksum(run):
    for folder in (run / "agents").iterdir():
        names = {path.name for path in folder.iterdir()}
        assert {*json.loads((folder / CHECKSUMS).read_text())} == names - {CHECKSUMS}
        assert {WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE} <= names
