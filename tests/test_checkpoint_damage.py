"""Damaged, hand-made, foreign and dangerous checkpoints: each ends in one sentence."""

import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from microglia.checkpoint import CONFIG, FORMAT_VERSION, Checkpoint
from microglia.checkpoint.files import checksum, read_all
from microglia.errors import CheckpointError
from microglia.training.lora import with_lora
from tests.full_disk import room_for
from tests.tiny import tiny_model
from tests.tiny_folder import checkpoint_for

AGENTS = "agents.safetensors"
MISFIT = r"the LoRA adapter of this checkpoint does not fit the model \("


@pytest.fixture
def folder(tmp_path):
    return checkpoint_for(tiny_model("llama")).save_pretrained(tmp_path / "saved")


def edit(folder, **changes):
    """Change the configuration as somebody would who means it: without the checksum of itself."""
    path = folder / CONFIG
    row = json.loads(path.read_text())
    row["sha256"].pop(CONFIG, None)
    row |= changes
    path.write_text(json.dumps({name: value for name, value in row.items() if value != "gone"}))


def swap_agents(folder, change):
    """Other tensors with the right checksum: what a hand-made checkpoint looks like."""
    tensors = load_file(folder / AGENTS)
    change(tensors)
    data = save(tensors)
    (folder / AGENTS).write_bytes(data)
    edit(folder, sha256={AGENTS: checksum(data)})


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def not_safetensors(folder):
    (folder / AGENTS).write_bytes(b"no tensors")
    edit(folder, sha256={AGENTS: checksum(b"no tensors")})


def with_nan(tensors):
    tensors["statistics.0.mean"][0] = torch.nan


def calibrated(**tensors):
    """A damage: calibration tensors of site 0 and 1."""
    return lambda f: swap_agents(
        f, lambda t: t.update({f"calibration.{name.removeprefix('of_')}": x for name, x in tensors.items()})
    )


def replaced_by(make):
    """A damage: something else where the agents were."""
    return lambda f: ((f / AGENTS).unlink(), make(f / AGENTS))


def sparse(size):
    """A file that says it has so many bytes and takes no room."""

    def make(path):
        with path.open("wb") as file:
            file.truncate(size)

    return make


def site_of(**geometry):
    return {"unit": "head", "name": "a", "layer": 0, "geometry": geometry}


DAMAGES = {
    "bit flipped": (lambda f: flip_a_bit(f / AGENTS), r"agents\.safetensors is damaged or belongs to another"),
    "truncated": (lambda f: (f / AGENTS).write_bytes((f / AGENTS).read_bytes()[:99]), r"its 99 bytes have not the SHA"),
    "no agents": (lambda f: (f / AGENTS).unlink(), r"lacks agents\.safetensors; copy the whole folder again"),
    "agents a folder": (lambda f: ((f / AGENTS).unlink(), (f / AGENTS).mkdir()), r"cannot be read \(Is a directory\)"),
    "no safetensors": (not_safetensors, r"agents\.safetensors is not safetensors"),
    "key missing": (
        lambda f: swap_agents(f, lambda t: t.pop("statistics.1.mean")),
        r"not fit .*: statistics\.1\.mean is miss",
    ),
    "key unknown": (lambda f: swap_agents(f, lambda t: t.update(x=torch.ones(1))), r"x is unknown"),
    "wrong shape": (
        lambda f: swap_agents(f, lambda t: t.update({"statistics.0.std": torch.ones(3)})),
        r"statistics\.0\.std has shape \(3,\), not \(16",
    ),
    "not a number": (lambda f: swap_agents(f, with_nan), r"statistics\.0\.mean holds NaN"),
    "half calibrated": (
        lambda f: swap_agents(f, lambda t: t.update({"calibration.0": torch.ones(2, 8)})),
        r"calibration\.1 is missing",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), r"holds no microglia_config\.json; give a folder"),
    "config cut": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:100]), r"damaged or cut short"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"damaged or cut short"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), r"has no format_version"),
    "config NaN": (lambda f: edit(f, threshold=float("nan")), r"NaN is not JSON"),
    "newer": (lambda f: edit(f, format_version=FORMAT_VERSION + 1), r"format version 3, .* up to 2; upgrade microglia"),
    "no version": (lambda f: edit(f, format_version="gone"), r"has no format_version"),
    "no checksum": (lambda f: edit(f, sha256="gone"), r"has no SHA-256"),
    "checksum elsewhere": (lambda f: edit(f, sha256={"../x": "0"}), r"must have that of agents\.safetensors"),
    "fields wrong": (
        lambda f: edit(f, window="gone", bucket="x", fill=True, more=1),
        r"lacks window and has the unknown more and has the wrong bucket='x', fill=True",
    ),
    "site wrong": (lambda f: edit(f, sites=[{}]), r"site 0 lacks geometry, layer, name, unit"),
    "geometry wrong": (
        lambda f: edit(f, sites=[site_of(heads=3, kv_heads=2, head_dim=1)]),
        r"3 heads in 2 groups of head size 1 make no geometry",
    ),
    "geometry half": (lambda f: edit(f, sites=[site_of(heads=3)]), r"\{'heads': 3\} is not one of units='head'"),
    "geometry of text": (
        lambda f: edit(f, sites=[site_of(heads="8", kv_heads=8.0, head_dim=6)]),
        r"the geometry of a has heads='8', kv_heads=8\.0; it must be whole numbers",
    ),
    "unit unknown": (lambda f: edit(f, sites=[{**site_of(), "unit": "claw"}]), r"units='claw' is unknown; choose head"),
    "value wrong": (
        lambda f: edit(f, policy="oracle"),
        r"policy='oracle' is unknown; choose agents, mixture, codebook, static, signal, layers or predictor",
    ),
    "signal unknown": (lambda f: edit(f, signals=["x"]), r"signals='x' is unknown; choose norm, entropy, "),
    "signals for two": (lambda f: edit(f, policy="signal"), r"signals='norm,entropy' is not one signal"),
    "signals no texts": (lambda f: edit(f, signals=[1]), r"has the wrong signals=\[1\]"),
    "fill unknown": (lambda f: edit(f, fill="noise"), r"fill='noise' is unknown; choose zero or mean"),
    "window wrong": (lambda f: edit(f, window=0), r"window=0 was given; it must be at least 1"),
    "option unknown": (lambda f: edit(f, policy_options={"depth": 3}), r"policy_options=.*depth.* make no policy"),
    "calibration narrow": (
        calibrated(of_0=torch.ones(2, 8), of_1=torch.ones(2, 7)),
        r"calibration\.1 has shape \(2, 7\), not \(2, 8\)",
    ),
    "calibration long": (
        calibrated(of_0=torch.ones(2, 8), of_1=torch.ones(3, 8)),
        r"calibration\.0 has shape \(2, 8\), not \(3, 8\)",
    ),
    "calibration flat": (calibrated(of_0=torch.ones(8), of_1=torch.ones(8)), r"calibration\.0 has shape \(8,\), not"),
    "calibration empty": (
        calibrated(of_0=torch.ones(0, 8), of_1=torch.ones(0, 8)),
        r"calibration\.0 has shape \(0, 8\)",
    ),
    "calibration of whole numbers": (
        calibrated(of_0=torch.ones(2, 8, dtype=torch.int64), of_1=torch.ones(2, 8)),
        r"calibration\.0 holds torch\.int64, not numbers with a point",
    ),
    "calibration NaN": (
        calibrated(of_0=torch.full((2, 8), torch.nan), of_1=torch.ones(2, 8)),
        r"calibration\.0 holds NaN",
    ),
    "calibration weights short": (
        calibrated(of_0=torch.ones(2, 8), of_1=torch.ones(2, 8), of_weights=torch.ones(3)),
        r"calibration\.0 has shape \(2, 8\), not \(3, 8\); calibration\.1 has shape \(2, 8\), not \(3, 8\)",
    ),
    "calibration weights alone": (calibrated(of_weights=torch.ones(3)), r"calibration\.0 is missing"),
    "calibration weights zero": (
        calibrated(of_0=torch.ones(2, 8), of_1=torch.ones(2, 8), of_weights=torch.zeros(2)),
        r"calibration\.weights holds numbers that are not above 0",
    ),
    "whole numbers": (
        lambda f: swap_agents(f, lambda t: t.update({"statistics.0.std": torch.ones(16, dtype=torch.int32)})),
        r"statistics\.0\.std holds torch\.int32, not numbers with a point",
    ),
    "hidden_dim huge": (
        lambda f: edit(f, policy_options={"hidden_dim": 4_000_000}),
        r"has shape \(16, 16\), not \(4000",
    ),
    "hidden_dim beyond": (lambda f: edit(f, policy_options={"hidden_dim": 10**30}), r"make no policy 'agents'"),
    "bucket huge": (lambda f: edit(f, bucket=10**30), r"bucket=1000.* was given; it must be at most 65536"),
    "window huge": (lambda f: edit(f, window=10**30), r"window=1000.* was given; it must be at most 2147483647"),
    "heads huge": (
        lambda f: edit(f, sites=[site_of(heads=10**30, kv_heads=1, head_dim=1)]),
        r"the geometry of a has heads=1000.*; it must be whole numbers of at most 65536",
    ),
    "sites many": (
        lambda f: edit(f, sites=[site_of(heads=8, kv_heads=8, head_dim=6)] * 5000),
        r"5000 sites make no policy; there must be 1 to 4096",
    ),
    "template with a width": (
        lambda f: edit(f, template="{question:>2000000000}"),
        r"the template '\{question:>2000000000\}' cannot be filled in .* use \{question\} as its only field",
    ),
    "template looks inside": (
        lambda f: edit(f, template="{question.__class__}"),
        r"use \{question\} as its only field",
    ),
    "template of many": (lambda f: edit(f, template="{question}" * 1000), r"holds the question 1000 times"),
    "agents a pipe": (replaced_by(os.mkfifo), r"agents\.safetensors cannot be read \(not a regular file\)"),
    "agents a device": (
        replaced_by(lambda path: path.symlink_to("/dev/zero")),
        r"agents\.safetensors cannot be read \(not a regular file\)",
    ),
    "agents endless": (replaced_by(sparse(2**40)), r"cannot be read \(1099511627776 bytes; at most \d+ belong there\)"),
    "config a pipe": (
        lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
        r"config\.json cannot be read \(not a reg",
    ),
    "config endless": (lambda f: sparse(2**40)(f / CONFIG), r"config\.json cannot be read \(1099511627776 bytes"),
    "option wrong": (lambda f: edit(f, policy_options={"hidden_dim": -3}), r"hidden_dim.*-3.* make no policy"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_ends_in_one_sentence(folder, kind):
    damage, sentence = DAMAGES[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        Checkpoint.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@contextmanager
def little_memory():
    """What is done inside takes less than 100 MB more than there was, at any moment."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell how much memory a process held")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = peak()
    yield
    assert peak() < before + 100


@pytest.mark.parametrize("policy", ["agents", "mixture", "predictor"])
def test_sizes_are_compared_before_anything_is_allocated(folder, policy):
    edit(folder, policy=policy, policy_options={"hidden_dim": 4_000_000})
    with little_memory(), pytest.raises(CheckpointError, match=r"does not fit microglia_config\.json"):
        Checkpoint.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_an_adapter_is_compared_before_it_is_allocated(tmp_path):
    wrapped = with_lora(tiny_model("llama"), rank=2)
    folder = checkpoint_for(wrapped).save_pretrained(tmp_path, wrapped)
    path = folder / "adapter" / "adapter_config.json"
    honest = path.read_bytes()
    row = json.loads(honest)
    sums = json.loads((folder / CONFIG).read_text())["sha256"]
    sums.pop(CONFIG)

    def loaded_with(data):
        path.write_bytes(data)
        edit(folder, sha256={**sums, "adapter/adapter_config.json": checksum(data)})
        return Checkpoint.from_pretrained(folder).load_onto(tiny_model("llama"))

    assert not any(p.is_meta for p in loaded_with(honest).parameters())
    changes = [{"r": 100_000}, {"r": 10**30}, {"peft_type": "PROMPT_TUNING"}, {"rank_pattern": {"q_proj": 100_000}}]
    for change in [*changes, {"target_modules": ["q_proj", "lm_head"]}]:
        with little_memory(), pytest.raises(CheckpointError, match=MISFIT):
            loaded_with(json.dumps({**row, **change}).encode())
    for data in (b"[]", b"{", b"\xff"):
        with pytest.raises(CheckpointError, match=MISFIT):
            loaded_with(data)


def test_no_flipped_bit_of_the_configuration_goes_unseen(folder):
    """At every byte, each of its bits in turn: refused, or (in the blanks) of no consequence."""
    config = Checkpoint.from_pretrained(folder).config
    data, sentences = (folder / CONFIG).read_bytes(), []
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (folder / CONFIG).write_bytes(damaged)
        try:
            assert Checkpoint.from_pretrained(folder).config == config
        except CheckpointError as error:
            sentences.append(str(error))
    assert len(sentences) > len(data) / 2
    assert not any("\n" in sentence for sentence in sentences)
    (folder / CONFIG).write_bytes(data.replace(b'"threshold": 0.0', b'"threshold": 0.1'))
    with pytest.raises(CheckpointError, match=r"was changed by hand.* take the line 'microglia_config.json' out of it"):
        Checkpoint.from_pretrained(folder)
    edit(folder, threshold=0.1)
    assert Checkpoint.from_pretrained(folder).config.threshold == 0.1


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_a_full_disk_leaves_the_previous_one(folder, size):
    """Without room for the agents, for all of them, and for the configuration, which is larger here."""
    before = Checkpoint.from_pretrained(folder)
    larger = checkpoint_for(tiny_model("llama"), seed=1, training={"notes": "x" * 90_000})
    with room_for(size), pytest.raises(CheckpointError, match=r"nothing can be written to .*saved \(File too large\)"):
        larger.save_pretrained(folder)
    again = Checkpoint.from_pretrained(folder)
    assert again.config == before.config
    assert all(x.equal(again.pruner.policy.state_dict()[name]) for name, x in before.pruner.policy.state_dict().items())
    assert Checkpoint.from_pretrained(larger.save_pretrained(folder)).config == larger.config


def test_many_may_save_and_load_at_once(tmp_path):
    """Every load is one of the checkpoints that were saved, whole; no writer disturbs another."""
    kinds = [checkpoint_for(tiny_model("llama"), seed=seed, fill=fill) for seed, fill in enumerate(("zero", "mean"))]
    truth = {saved.config.fill: saved.pruner.policy.state_dict() for saved in kinds}
    kinds[0].save_pretrained(tmp_path)

    def save_or_load(turn):
        if turn % 3:
            kinds[turn % 2].save_pretrained(tmp_path)
            return None
        return Checkpoint.from_pretrained(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        loads = [loaded for loaded in pool.map(save_or_load, range(96)) if loaded is not None]
    assert {loaded.config.fill for loaded in loads} == {"zero", "mean"}
    for loaded in [*loads, Checkpoint.from_pretrained(tmp_path)]:
        assert all(loaded.pruner.policy.state_dict()[name].equal(x) for name, x in truth[loaded.config.fill].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", AGENTS, CONFIG]


def test_a_reader_that_is_overtaken_reads_the_newer(folder, monkeypatch):
    newer = checkpoint_for(tiny_model("llama"), seed=1, fill="mean")

    def overtaken(*arguments):
        monkeypatch.undo()
        newer.save_pretrained(folder)
        return read_all(*arguments)

    monkeypatch.setattr("microglia.checkpoint.checkpoint.read_all", overtaken)
    loaded = Checkpoint.from_pretrained(folder)
    assert loaded.config.fill == "mean"
    assert all(loaded.pruner.policy.state_dict()[name].equal(x) for name, x in newer.pruner.policy.state_dict().items())


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("agents.bin", "agents.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    Checkpoint.from_pretrained(folder)  # beside good files they are ignored
    (folder / AGENTS).unlink()
    with pytest.raises(CheckpointError, match=r"agents\.bin, agents\.pt may hold pickles, .* never reads them"):
        Checkpoint.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()
