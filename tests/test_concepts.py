"""A kind of unit, a signal, a policy, an execution and a family that the package does not know: registered, and run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from microglia.anatomy import FAMILIES, Anatomy, Family, Separate, swap
from microglia.anatomy.projection import tensor_bytes
from microglia.attach import attached
from microglia.errors import ConfigError
from microglia.execution import EXECUTIONS, Captured, Execution, Prepared
from microglia.explain import explain
from microglia.gate import Gate
from microglia.generation import generate
from microglia.passes import positions
from microglia.policies import POLICIES, AgentPolicy, SitewisePolicy, StaticPolicy
from microglia.pruner import Pruner
from microglia.signals import SIGNALS, Signal
from microglia.units import UNITS, Site, find_sites
from tests.tiny import Fixed, step_logits, tiny_model, tiny_prompts, tiny_tokenizer, uneven, wild

PROMPTS = ["what is 3+4?", "7*8-2=", "a"]
IDS, MASK = tiny_prompts(14, 9, 3)
ANSWER = tiny_prompts(7, 7, 7, seed=2)[0]
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10}


# --- a kind of unit: the whole MLP of a layer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """One unit, which may go: an MLP."""

    unit: ClassVar[str] = "mlp"
    protected: ClassVar[int] = 0

    count: int = 1
    default_bucket: ClassVar[int] = 1

    def rectangle(self, scores, bucket=None):
        return scores > 0


class Nothing(nn.Module):
    """What is left of an MLP that was cut out."""

    def forward(self, hidden):
        return torch.zeros_like(hidden)


class ForRows(nn.Module):
    """An MLP for the rows that keep it."""

    def __init__(self, inner, keep):
        super().__init__()
        self.inner, self.keep = inner, keep

    def forward(self, hidden):
        output = torch.zeros_like(hidden)
        output[self.keep] = self.inner(hidden[self.keep])
        return output


@dataclass(frozen=True, eq=False)
class MlpSite(Site):
    """The MLP of one layer."""

    geometry_type: ClassVar[type] = Whole

    @classmethod
    def in_layer(cls, index, layer):
        return cls(index, layer, Whole())

    @property
    def name(self):
        return self.layer.mlp_name

    @contextmanager
    def gated(self, keep, *, where=None, fill=None) -> Iterator[None]:
        def gate(_, inputs, output):
            factor = keep[:, :, None].to(output)  # (B or 1, 1, 1)
            return output * (factor if where is None else torch.where(where[..., None], factor, 1))

        handle = self.layer.mlp.register_forward_hook(gate)
        try:
            yield
        finally:
            handle.remove()

    def cut(self, stack, keep, cache):
        swap(stack, self.layer.module, self.layer.family.mlp_name, Nothing())

    def cut_rows(self, stack, keep, cache):
        swap(stack, self.layer.module, self.layer.family.mlp_name, ForRows(self.layer.mlp, keep[:, 0]))

    def saved_bytes(self, keep):
        return 0 if bool(keep.all()) else sum(tensor_bytes(x) for x in self.layer.mlp.parameters())


class MlpSize(Signal):
    """Mean magnitude of what the MLP writes."""

    name: ClassVar[str] = "mlp_size"
    unit: ClassVar[str] = "mlp"

    @contextmanager
    def measure(self, site, prompt, put):
        def hook(_, inputs, output):
            put((output.float().abs().mean(-1) * prompt.weight).sum(1, keepdim=True) / prompt.count)

        handle = site.layer.mlp.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def score(self, values):
        return values


class Largest(SitewisePolicy):
    """Keeps an MLP whose size is above a line of its own."""

    name: ClassVar[str] = "largest"
    signals = ("mlp_size",)

    def __init__(self, lines):
        super().__init__()
        self.lines = nn.ParameterList(nn.Parameter(torch.tensor(line)) for line in lines)

    @classmethod
    def create(cls, geometries, signals, **options):
        return cls([0.0] * len(geometries))

    def site_logits(self, index, features):
        return features - self.lines[index]


@pytest.fixture
def mlps(monkeypatch):
    """The kind of unit, its signal and the policy, under their names."""
    monkeypatch.setitem(UNITS, "mlp", MlpSite)
    monkeypatch.setitem(SIGNALS, "mlp_size", MlpSize())
    monkeypatch.setitem(POLICIES, "largest", Largest)


def model_with_large_mlps(family):
    """So that their absence changes tokens."""
    model = tiny_model(family)
    for layer in Anatomy(model).layers:
        layer.mlp.get_submodule(layer.family.mlp.down).weight.data.mul_(20)
    return model


def largest(model):
    """The policy by its name, with lines that some of these prompts' MLPs are above."""
    sites = find_sites(model, ("mlp",))
    pruner = Pruner(POLICIES["largest"].create([site.geometry for site in sites], ()), units=("mlp",))
    batch = tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad(), attached(model, pruner, "dense") as trace:
        model(**batch, position_ids=positions(batch["attention_mask"]))
    return Pruner(Largest([float(x.median()) for x in trace.features]), units=("mlp",))


def answer(model, pruner, execution, **options):
    return generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **LENGTH, **options)


def test_a_units_answers_are_the_same_masked_and_cut(family, mlps, snapshot):
    model = model_with_large_mlps(family)
    pruner, before = largest(model), snapshot(model)
    masked, compact = (answer(model, pruner, execution) for execution in ("masked", "compact"))
    assert masked.tokens.equal(compact.tokens)
    assert not masked.tokens.equal(answer(model, pruner, "dense").tokens)
    assert [k.sum().item() for k in masked.keep] == [1, 1]  # of three rows
    assert [list(signals) for signals in masked.signals] == [["mlp_size"]] * 2
    assert snapshot(model) == before


@pytest.mark.parametrize("logits", [[[-1.0]], [[-1.0], [1.0], [-1.0]]], ids=["shared", "rows"])
def test_a_units_logits_are_the_same_masked_and_cut(family, mlps, logits):
    model = tiny_model(family)
    policy = Fixed([torch.tensor(logits), torch.ones(1, 1)])
    policy.signals = ()
    dense, steps = step_logits(model, IDS, MASK, ANSWER), {}
    for execution in ("masked", "compact", "dense"):
        with attached(model, Pruner(policy, units=("mlp",)), execution):
            steps[execution] = step_logits(model, IDS, MASK, ANSWER)
    torch.testing.assert_close(steps["compact"], steps["masked"], atol=1e-5, rtol=0)
    assert steps["dense"].equal(dense)
    assert (steps["masked"][:, 1:] - dense[:, 1:]).abs().amax((1, 2))[0] > 1e-2
    site = find_sites(model, ("mlp",))[0]
    assert site.saved_bytes(torch.zeros(1, 1)) == 4 * sum(p.numel() for p in site.layer.mlp.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_two_kinds_of_units_go_together(family, mlps):
    model = tiny_model(family)
    sites = find_sites(model, ("head", "mlp"))
    assert [(site.index, site.unit, site.layer.index) for site in sites] == [
        (0, "head", 0),
        (1, "head", 1),
        (2, "mlp", 0),
        (3, "mlp", 1),
    ]
    torch.manual_seed(0)
    policy = AgentPolicy([site.geometry for site in sites], signals=("norm", "entropy", "mlp_size"))
    for agent in policy.agents:
        agent.last.weight.data.normal_()
        agent.last.bias.data.fill_(-0.5)
    pruner = Pruner(policy, Gate(bucket=1), units=("head", "mlp"))
    masked, compact = (answer(model, pruner, execution) for execution in ("masked", "compact"))
    assert masked.tokens.equal(compact.tokens)
    assert [tuple(k.shape) for k in masked.keep] == [(3, 8), (3, 8), (3, 1), (3, 1)]
    assert [list(signals) for signals in masked.signals] == [["norm", "entropy"]] * 2 + [["mlp_size"]] * 2
    shown = explain(model, tiny_tokenizer(), PROMPTS[0], pruner)
    assert [list(site.signals) for site in shown.sites] == [list(signals) for signals in masked.signals]
    assert [site.kept for site in shown.sites] == [[bool(k) for k in keep[0]] for keep in masked.keep]


def test_units_that_an_execution_cannot_prune_are_refused(mlps):
    model = tiny_model("llama")
    pruner = largest(model)
    sentence = "captured steps prune heads, channels and sublayers, but units='mlp' was given; use execution='compact'"
    for execution in ("captured", Captured(model)):
        with pytest.raises(ConfigError, match=sentence):
            answer(model, pruner, execution)
    answer(model, pruner, "masked")  # free again


def test_a_signal_of_units_that_are_not_decided_about_is_refused(mlps):
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError, match="signals='mlp_size' is measured at units='mlp', but units='head' are decided"
    ):
        Pruner(largest(model).policy)


# --- an execution -----------------------------------------------------------------------------------------------------


class Loop(Execution):
    """Gates heads by hooks of its own, reads prompts into a cache of its own and writes in a loop of its own."""

    name: ClassVar[str] = "loop"

    def __init__(self, lm):
        self.lm, self.applied, self.steps = lm, 0, 0

    @classmethod
    def for_model(cls, model):
        return cls(model)

    @contextmanager
    def prepared(self, request):
        cache = DynamicCache(config=self.lm.config)

        def greedy(logits):
            tokens, mask = [logits.argmax(-1, keepdim=True)], request.mask
            while len(tokens) < request.new_tokens:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                place = positions(mask)[:, -1:]
                output = self.lm(tokens[-1], attention_mask=mask, position_ids=place, past_key_values=cache)
                tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
                self.steps += 1
            return torch.cat(tokens, 1)

        yield Prepared(cache, greedy)

    @contextmanager
    def apply(self, sites, decision, cache):
        self.applied += 1
        handles = []
        for site, keep in zip(sites, decision.keep, strict=True):
            gates = keep.repeat_interleave(site.geometry.head_dim, -1)[:, None]
            handles.append(site.output.register_forward_pre_hook(lambda _, inputs, gates=gates: (inputs[0] * gates,)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "rows"])
def test_an_execution_by_its_name_or_as_a_value(family, make, monkeypatch, snapshot):
    monkeypatch.setitem(EXECUTIONS, "loop", Loop)
    model = tiny_model(family)
    pruner, before, options = make(model), snapshot(model), {"max_new_tokens": 10, "eos_token_id": None}
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution="masked", **options)
    kept = Loop(model)
    for execution in ("loop", kept, kept):
        result = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **options)
        assert result.tokens.equal(truth.tokens)
        assert all(a.equal(b) for a, b in zip(result.keep, truth.keep, strict=True))
    assert (kept.applied, kept.steps) == (2, 18)
    sampled = []
    for execution in ("masked", "loop"):  # not by its loop
        torch.manual_seed(0)
        sampled.append(
            generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, do_sample=True, **options)
        )
    assert sampled[0].tokens.equal(sampled[1].tokens)
    assert snapshot(model) == before


# --- a policy and a signal for heads ----------------------------------------------------------------------------------


class HeadPeak(Signal):
    """The largest value that a head writes anywhere in the prompt."""

    name: ClassVar[str] = "peak"
    unit: ClassVar[str] = "head"

    @contextmanager
    def measure(self, site, prompt, put):
        def hook(_, inputs):
            values = site.geometry.split(inputs[0]).float().amax(-1)
            put(values.masked_fill(~prompt.tokens[..., None], float("-inf")).amax(1))

        handle = site.output.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def score(self, values):
        return values - values.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", ["signal", "agents"])
def test_a_signal_feeds_any_policy_with_every_execution(family, name, monkeypatch):
    monkeypatch.setitem(SIGNALS, "peak", HeadPeak())
    model = tiny_model(family)
    torch.manual_seed(0)
    policy = POLICIES[name].create([site.geometry for site in find_sites(model)], ("peak",))
    if name == "agents":
        for agent in policy.agents:
            agent.last.weight.data.normal_()
            agent.last.bias.data.zero_()
    pruner = Pruner(policy, Gate(bucket=1))
    masked, compact, captured = (answer(model, pruner, execution) for execution in ("masked", "compact", "captured"))
    assert masked.tokens.equal(compact.tokens)
    assert masked.tokens.equal(captured.tokens)
    assert [list(signals) for signals in masked.signals] == [["peak"]] * 2
    assert all(0 < k.mean() < 1 for k in masked.keep)


# --- a family ---------------------------------------------------------------------------------------------------------


class StrangeAttention(LlamaAttention):
    """Llama's attention, which names its projections otherwise."""

    q_proj = property(lambda self: self.wq)
    k_proj = property(lambda self: self.wk)
    v_proj = property(lambda self: self.wv)
    o_proj = property(lambda self: self.wo)


def strange_model(**changes):
    model = tiny_model("llama", **changes)
    for layer in model.model.layers:
        layer.self_attn.__class__ = StrangeAttention
        for name in ("q", "k", "v", "o"):
            layer.self_attn._modules[f"w{name}"] = layer.self_attn._modules.pop(f"{name}_proj")
    return model


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "rows"])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_a_family_is_one_line(kv_heads, rows, fill, monkeypatch, snapshot):
    layout = Separate("wq", "wk", "wv", "wo")
    monkeypatch.setitem(FAMILIES, "StrangeAttention", Family("LlamaForCausalLM", "LlamaModel", attention=layout))
    model, usual = strange_model(num_key_value_heads=kv_heads), tiny_model("llama", num_key_value_heads=kv_heads)
    before, steps = snapshot(model), {}
    pruner = uneven(model, rows, fill=fill)
    for execution in ("masked", "compact"):
        with attached(model, pruner, execution):
            steps[execution] = step_logits(model, IDS, MASK, ANSWER)
    with attached(usual, pruner, "masked"):
        truth = step_logits(usual, IDS, MASK, ANSWER)
    torch.testing.assert_close(steps["masked"], truth, atol=1e-6, rtol=0)
    torch.testing.assert_close(steps["compact"], steps["masked"], atol=1e-5, rtol=0)
    assert answer(model, pruner, "captured").tokens.equal(answer(usual, pruner, "masked").tokens)
    assert answer(model, wild(model), "compact").tokens.equal(answer(usual, wild(usual), "compact").tokens)
    assert snapshot(model) == before


def test_a_static_policy_prunes_any_unit(mlps):
    """Its geometries are all that it needs."""
    model = tiny_model("llama")
    sites = find_sites(model, ("mlp", "head"))
    policy = StaticPolicy.random([site.geometry for site in sites], seed=0)
    pruner = Pruner(policy, Gate(threshold=0.5, bucket=1), units=("mlp", "head"))
    masked, compact = (answer(model, pruner, execution) for execution in ("masked", "compact"))
    assert masked.tokens.equal(compact.tokens)
    assert masked.signals == [{}] * 4
