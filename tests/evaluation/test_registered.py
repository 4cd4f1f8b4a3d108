"""A kind of unit, a policy, an execution, a criterion and a family from outside the package go through `evaluate`."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from microglia.anatomy import FAMILIES, Family, Separate
from microglia.criteria import CRITERIA, Criterion
from microglia.errors import ConfigError
from microglia.evaluation.setup import Setup
from microglia.execution import EXECUTIONS
from microglia.experiments.compare.entries import make_entries
from microglia.gate import Gate
from microglia.policies import POLICIES
from microglia.pruner import Pruner
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.units import find_sites
from tests.test_concepts import Loop, mlps, strange_model  # noqa: F401  # a fixture
from tests.tiny import tiny_model, uneven
from tests.tiny_folder import character_tokenizer

TOKENIZER, TASK = character_tokenizer(), get_task("arithmetic")
CHANGES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048}


@dataclass(frozen=True, kw_only=True)
class Alternating(Criterion):
    """Every other head; `first` is the one that it begins with."""

    name: ClassVar[str] = "alternating"
    score: ClassVar[str] = "whether the head's number is even"
    paper: ClassVar[str] = "none"
    departs: ClassVar[str] = "not at all"

    first: int = 0

    def scores(self, calibration):
        return [(torch.arange(site.geometry.count) % 2 == self.first).float() for site in calibration.sites]


def setup_of(model, execution="compact"):
    """Three short questions."""
    return Setup(model, TOKENIZER, TASK, TASK.load("test", limit=3), execution, max_new_tokens=6)


def texts(setup, pruner):
    return [answer.text for answer in setup.answers(pruner).answers]


def test_a_kind_of_unit_and_a_policy(mlps):  # noqa: F811
    setup = setup_of(tiny_model("llama", **CHANGES))
    geometries = [site.geometry for site in find_sites(setup.model, ("mlp",))]
    pruner = Pruner(POLICIES["largest"].create(geometries, ()), units=("mlp",))
    lines = [float(x.median()) for x in setup.logits(pruner)]  # with lines at 0, logits are the sizes
    pruner = replace(pruner, policy=type(pruner.policy)(lines))
    results = {name: replace(setup, execution=name).answers(pruner) for name in ("masked", "compact")}
    assert [a.text for a in results["masked"].answers] == [a.text for a in results["compact"].answers]
    assert sorted(a.keep_ratio for a in results["compact"].answers) != [1, 1, 1]
    summary = results["compact"].summary(setup.answers(None))
    assert 0 < summary.sparsity < 1
    assert [len(row) for row in summary.heads["mlp_kept"]] == [1, 1]


def test_an_execution(monkeypatch):
    monkeypatch.setitem(EXECUTIONS, "loop", Loop)
    setup = setup_of(tiny_model("llama", **CHANGES))
    pruner, kept = uneven(setup.model), Loop(setup.model)
    truth = texts(setup, pruner)
    assert texts(replace(setup, execution="loop"), pruner) == truth
    assert texts(replace(setup, execution=kept), pruner) == truth
    assert kept.applied == 1


def test_a_criterion(monkeypatch):
    monkeypatch.setitem(CRITERIA, "alternating", Alternating)
    setup = setup_of(tiny_model("llama", **CHANGES))
    like = uneven(setup.model)
    trained = {name: [like] for name in ("agents", "static_baseline")}

    def entry(name):
        return make_entries([name], setup, lambda limit, seed: setup.examples, trained, like=like)[-1]

    pruner = replace(entry("alternating").make(0), gate=Gate(bucket=1))
    result = setup.answers(pruner)
    assert [answer.keep_ratio for answer in result.answers] == [0.5] * 3
    assert result.summary().heads["kept"] == [[1.0, 0.0] * 4] * 2
    with pytest.raises(ConfigError, match="criterion='alternate' is unknown; choose"):
        entry("alternate")


def test_a_family(monkeypatch):
    family = Family("LlamaForCausalLM", "LlamaModel", attention=Separate("wq", "wk", "wv", "wo"))
    monkeypatch.setitem(FAMILIES, "StrangeAttention", family)
    usual = setup_of(tiny_model("llama", **CHANGES))
    setup = setup_of(strange_model(**CHANGES))
    for execution in ("masked", "compact", "captured"):
        assert texts(replace(setup, execution=execution), uneven(setup.model)) == texts(usual, uneven(usual.model))


def test_the_facade_takes_another_kind_of_unit_at_a_keep_ratio(mlps):  # noqa: F811
    system = MicrogliaPruningSystem(tiny_model("llama", **CHANGES), tokenizer=TOKENIZER)
    geometries = [site.geometry for site in find_sites(system.model, ("mlp",))]
    system.pruner = Pruner(POLICIES["largest"].create(geometries, ()), units=("mlp",))
    questions = [example.question for example in TASK.load("validation", limit=6)]
    system.set_keep_ratio(0.5, questions)
    system.generate(questions, 3)
    assert 0.25 <= sum(system.get_sparsities()) / 6 <= 0.5
