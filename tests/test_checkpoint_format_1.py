"""Checkpoints that microglia 0.1.0 wrote: they decide as they did there, or one sentence says why they cannot be used.

Rows and tensors of format 1 are made from today's by the inverse of what loading does; one configuration is verbatim.
"""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save

from microglia.checkpoint import CONFIG, Checkpoint, MicrogliaConfig
from microglia.checkpoint.files import checksum
from microglia.errors import CheckpointError
from microglia.gate import Gate
from microglia.generation import generate
from microglia.policies import AgentPolicy, MixturePolicy, PredictorPolicy, SignalPolicy, StaticPolicy
from microglia.pruner import Budget, Pruner
from microglia.reading import read_prompts
from tests.tiny import geometries_of, tiny_model
from tests.tiny_folder import character_tokenizer

AGENTS = "agents.safetensors"
PROMPTS = ["Tom has 3 apples.", "Ann buys 12 pens and gives 5 of them away. How many are left?", "1 + 1 ="]
FEATURES = {("norm", "entropy"): "both", ("norm",): "norm", ("entropy",): "entropy", (): "both"}
MAKERS = {
    "agents": partial(AgentPolicy, hidden_dim=3),
    "agents on norms": partial(AgentPolicy, hidden_dim=3, signals=("norm",)),
    "mixture": partial(MixturePolicy, hidden_dim=4),
    "static": partial(StaticPolicy.random, seed=3),
    "signal": lambda geometries: SignalPolicy("entropy"),
    "predictor": partial(PredictorPolicy, hidden_dim=5, signals=("entropy",)),
}
# What 0.1.0 called the tensors of each kind on two sites, beside the calibration's.
STATISTICS = {"mean_0", "mean_1", "std_0", "std_1"}
NAMES = {
    "agents": STATISTICS
    | {f"agents.{i}.network.{j}.{part}" for i in (0, 1) for j in (0, 2) for part in ("weight", "bias")},
    "mixture": STATISTICS
    | {f"agents.{i}.{part}" for i in (0, 1) for part in ("masks", "router.weight", "router.bias")},
    "static": {"logits.0", "logits.1"},
    "signal": set(),
    "predictor": {"mean", "std"} | {f"agent.network.{j}.{part}" for j in (0, 2) for part in ("weight", "bias")},
}
# As 0.1.0 wrote it.
VERBATIM = """{
  "format_version": 1,
  "base_model": "tiny",
  "model_class": "LlamaForCausalLM",
  "sites": [
    {
      "name": "model.layers.0.self_attn",
      "layer": 0,
      "heads": 8,
      "kv_heads": 8,
      "head_dim": 6
    },
    {
      "name": "model.layers.1.self_attn",
      "layer": 1,
      "heads": 8,
      "kv_heads": 8,
      "head_dim": 6
    }
  ],
  "base_parameters": 46992,
  "policy": "mixture",
  "hidden_dim": 4,
  "features": "both",
  "norm": "head",
  "window": 5,
  "temperature": 0.7,
  "threshold": 0.7941316962242126,
  "bucket": 2,
  "fill": "zero",
  "scope": "answer",
  "template": "{question}",
  "training": {
    "dataset": "x"
  },
  "promise": {},
  "lora": false,
  "sha256": {
    "agents.safetensors": "990726f2f087f973a8f5323ab45f385baf844ffc1cf30baa22136d927dbf0811",
    "microglia_config.json": "3b7fa75d01a465e890ee998b33703cf9391ffde0791705ef676292ed2c634a3b"
  }
}
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=99, max_position_embeddings=512)


def pruner_of_kind(kind, model):
    """A pruner of a kind with random weights and statistics, whose threshold is in the middle of its logits."""
    policy = MAKERS[kind](geometries_of(model))
    generator = torch.Generator().manual_seed(7)
    size = 8 * len(policy.signals)
    policy.fit_statistics([torch.rand(9, size, generator=generator) + site for site in range(2)])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    logits = read_prompts(model, character_tokenizer(), PROMPTS, Pruner(policy, window=5)).logits
    threshold = torch.cat([x.flatten() for x in logits]).median().item()
    gate = Gate(temperature=0.7, threshold=threshold, bucket=2)
    budget = Budget([x.detach() for x in logits], geometries_of(model), bucket=2)
    return Pruner(policy, gate, window=5, fill="mean", budget=budget)


def as_format_1(folder, **changes):
    """Rewrite a checkpoint as 0.1.0 would have written it."""
    row = json.loads((folder / CONFIG).read_text())
    tensors = {old_name(name): x for name, x in load_file(folder / AGENTS).items()}
    data = save(tensors)
    (folder / AGENTS).write_bytes(data)
    row["sites"] = [{"name": s["name"], "layer": s["layer"], **s["geometry"]} for s in row["sites"]]
    options, *_ = (row.pop(name) for name in ("policy_options", "units", "used", "least_kept", "recovery"))
    row |= {"format_version": 1, "hidden_dim": options.get("hidden_dim", 128)}
    row |= {"features": FEATURES[tuple(row.pop("signals"))], "norm": "head", "scope": "answer"}
    row |= {"sha256": {AGENTS: checksum(data)}, **changes}
    (folder / CONFIG).write_text(json.dumps({name: x for name, x in row.items() if x != "gone"}))
    return row, tensors.keys()


def old_name(name):
    """statistics.0.mean → mean_0, statistics.mean → mean."""
    if not name.startswith("statistics."):
        return name
    *site, kind = name.removeprefix("statistics.").split(".")
    return "_".join([kind, *site])


@pytest.mark.parametrize("kind", MAKERS)
def test_a_checkpoint_of_0_1_decides_as_it_did(model, tmp_path, kind):
    pruner = pruner_of_kind(kind, model)
    Checkpoint.of(model, pruner, base_model="tiny").save_pretrained(tmp_path)
    row, names = as_format_1(tmp_path)
    assert row.keys() == json.loads(VERBATIM).keys()
    assert row["sites"] == json.loads(VERBATIM)["sites"]
    assert names == NAMES[kind.split()[0]] | {"calibration.0", "calibration.1"}

    loaded = Checkpoint.from_pretrained(tmp_path)
    loaded.check(model)
    assert loaded.pruner.fingerprint() == pruner.fingerprint()
    assert loaded.pruner.at(0.4).gate == pruner.at(0.4).gate
    before, after = (
        generate(model, character_tokenizer(), PROMPTS, each, max_new_tokens=8) for each in (pruner, loaded.pruner)
    )
    assert 0 < sum(float(k.mean()) for k in before.keep) < len(before.keep)
    assert all(a.equal(b) for a, b in zip(before.keep, after.keep, strict=True))
    assert before.tokens.equal(after.tokens)

    loaded.save_pretrained(tmp_path / "again")  # in today's format
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["format_version"] == 2
    assert Checkpoint.from_pretrained(tmp_path / "again").pruner.fingerprint() == pruner.fingerprint()


def test_a_configuration_of_0_1_is_read_with_the_checksum_of_itself(model):
    config, sums = MicrogliaConfig.from_json(VERBATIM.encode(), "it")
    assert config.differences(model) == []
    assert (config.policy, config.policy_options, config.signals) == ("mixture", {"hidden_dim": 4}, ("norm", "entropy"))
    assert (config.units, config.window, config.fill) == (("head",), 5, "zero")
    assert config.gate == Gate(temperature=0.7, threshold=0.7941316962242126, bucket=2)
    assert config.training == {"dataset": "x"}
    assert [*sums] == [AGENTS]
    with pytest.raises(CheckpointError, match="is damaged or was changed by hand"):
        MicrogliaConfig.from_json(VERBATIM.replace('"window": 5', '"window": 6').encode(), "it")
    without = {name: x for name, x in json.loads(VERBATIM).items() if name not in ("promise", "sha256")}
    first = json.dumps({**without, "sha256": {AGENTS: "0"}}).encode()  # of before there were promises
    assert MicrogliaConfig.from_json(first, "it")[0] == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scope": "all"}, r"was trained with scope='all', a mode .* no longer has; use it with microglia 0\.1\.0, or"),
        (
            {"norm": "hidden"},
            r"was trained with norm='hidden', a mode .* use it with microglia 0\.1\.0, or train again",
        ),
        ({"features": "x"}, r"has the wrong features='x'; copy or save the checkpoint again"),
        ({"features": []}, r"has the wrong features=\[\]"),
        ({"features": "gone"}, r"has the wrong features=None"),
        ({"hidden_dim": "gone"}, r"has the wrong hidden_dim=None"),
        ({"hidden_dim": 0}, r"has the wrong hidden_dim=0"),
        ({"hidden_dim": True}, r"has the wrong hidden_dim=True"),
        ({"sites": None}, r"has the wrong sites=None"),
        ({"sites": [1]}, r"site 0 holds a int in place of an object"),
        ({"sites": [{"name": "a", "layer": 0, "heads": 8}]}, r"\{'heads': 8\} is not one of units='head'"),
        ({"policy": "signal"}, r"signals='norm,entropy' is not one signal"),
        ({"policy": "oracle"}, r"policy='oracle' is unknown; choose agents"),
        ({"fill": "gone"}, r"lacks fill"),
        ({"format_version": 3}, r"has format version 3, but this microglia reads up to 2; upgrade microglia"),
    ],
    ids=str,
)
def test_what_is_gone_or_damaged_is_refused_in_a_sentence(model, tmp_path, changes, sentence):
    pruner = pruner_of_kind("agents", model)
    Checkpoint.of(model, pruner, base_model="tiny").save_pretrained(tmp_path)
    as_format_1(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        Checkpoint.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
