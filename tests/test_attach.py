"""Attaching: untouched while every head is kept, restored whatever happens, deciding on the prompt alone."""

import copy
import threading

import pytest
import torch

from microglia.attach import attached
from microglia.errors import ConfigError, MicrogliaError
from microglia.gate import Gate
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.units import find_sites
from tests.tiny import BACKENDS, geometries_of, positions, step_logits, tiny_model, tiny_prompts, uneven, wild

IDS, MASK = tiny_prompts(14, 9, 3)
ANSWER = tiny_prompts(5, 5, 5, seed=2)[0]


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_all_ones_are_the_untouched_model_bit_for_bit(family, backend, execution):
    model = tiny_model(family, backend=backend)
    dense = step_logits(model, IDS, MASK, ANSWER)
    pruner = Pruner(StaticPolicy.all_kept(geometries_of(model)))
    with attached(model, pruner, execution) as trace:
        assert step_logits(model, IDS, MASK, ANSWER).equal(dense)
    assert trace.keep_ratio.tolist() == [1, 1, 1]


def test_the_prompt_is_dense_and_the_answer_is_gated_at_the_output_projection(family):
    """The truth by hand: zeros written into the output projection's input in every pass but the first."""
    model, keeps = tiny_model(family), []
    sites = find_sites(model)
    with attached(model, uneven(model)) as trace:
        ours = step_logits(model, IDS, MASK, ANSWER)
        keeps = trace.keep
    dense = step_logits(model, IDS, MASK, ANSWER)

    def zero(site, inputs):
        x = inputs[0].clone()
        for head in (keeps[site.index][0] == 0).nonzero().flatten().tolist() if x.shape[1] == 1 else []:
            x[:, :, head * site.geometry.head_dim : (head + 1) * site.geometry.head_dim] = 0
        return (x,)

    handles = [s.output.register_forward_pre_hook(lambda _, inputs, s=s: zero(s, inputs)) for s in sites]
    truth = step_logits(model, IDS, MASK, ANSWER)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)
    assert ours[:, 0].equal(dense[:, 0])
    assert (ours[:, 1:] - dense[:, 1:]).abs().max() > 1e-2


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "own"])
def test_dense_decides_and_changes_nothing(family, make):
    model = tiny_model(family)
    pruner, dense = make(model), step_logits(model, IDS, MASK, ANSWER)
    with attached(model, pruner, "masked") as masked:
        step_logits(model, IDS, MASK, ANSWER)
    with attached(model, pruner, "dense") as trace:
        assert step_logits(model, IDS, MASK, ANSWER).equal(dense)
    assert trace.keep_ratio.equal(masked.keep_ratio)
    assert (trace.keep_ratio < 1).all()
    for name in ("features", "logits", "keep"):
        assert all(a.equal(b) for a, b in zip(getattr(trace, name), getattr(masked, name), strict=True))


def test_mean_fill_stands_in_for_pruned_heads():
    model = tiny_model("llama")
    site, prompt, answer = find_sites(model)[0], [], []
    handle = site.output.register_forward_pre_hook(lambda _, inputs: prompt.append(site.geometry.split(inputs[0])))
    with torch.no_grad(), attached(model, uneven(model, fill="mean")) as trace:
        cache = model(input_ids=IDS, attention_mask=MASK, use_cache=True).past_key_values
        handle.remove()
        site.output.register_forward_pre_hook(lambda _, inputs: answer.append(site.geometry.split(inputs[0])))
        mask = torch.cat([MASK, MASK[:, -1:]], dim=1)
        model(input_ids=ANSWER[:, :1], attention_mask=mask, past_key_values=cache)
    pruned = trace.keep[0][0] == 0
    means = torch.stack([x[tokens.bool()].mean(0) for x, tokens in zip(prompt[0], MASK, strict=True)])
    assert pruned.any()
    torch.testing.assert_close(answer[-1][:, 0, pruned], means[:, pruned], atol=1e-5, rtol=1e-5)


# --- a decision belongs to its prompt ---------------------------------------------------------------------------------


def decide(model, pruner, ids, mask, **options):
    with torch.no_grad(), attached(model, pruner, **options) as trace:
        model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    return trace


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_a_prompt_is_decided_the_same_alone_in_a_batch_and_padded(family, backend):
    model = tiny_model(family, backend=backend)
    pruner = wild(model)
    batch = decide(model, pruner, IDS, MASK)
    assert len({tuple(torch.cat(row).tolist()) for row in zip(*batch.keep, strict=True)}) == 3  # they do differ
    for row in range(3):
        tokens = MASK[row].bool()
        alone = decide(model, pruner, IDS[row : row + 1, tokens], MASK[row : row + 1, tokens])
        padded = decide(model, pruner, IDS[row : row + 1], MASK[row : row + 1])
        for one, two, many in zip(alone.features, padded.features, batch.features, strict=True):
            torch.testing.assert_close(one, many[row : row + 1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(two, many[row : row + 1], atol=1e-4, rtol=1e-4)
        for one, two, many in zip(alone.keep, padded.keep, batch.keep, strict=True):
            assert one.equal(many[row : row + 1])
            assert two.equal(many[row : row + 1])


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_the_answer_has_no_say(family, execution):
    model = tiny_model(family)
    pruner = wild(model)
    keeps = []
    for seed in (2, 3):
        with attached(model, pruner, execution) as trace:
            step_logits(model, IDS, MASK, tiny_prompts(5, 5, 5, seed=seed)[0])
        keeps.append(torch.cat(trace.keep, dim=-1))
    assert keeps[0].equal(keeps[1])
    assert keeps[0].equal(torch.cat(decide(model, pruner, IDS, MASK).keep, dim=-1))


def test_given_tokens_limit_what_is_measured_to_the_prompt():
    """A pass that holds prompt and answer decides as the prompt alone does, when the prompt's tokens are given."""
    model = tiny_model("llama")
    pruner = wild(model)
    ids = torch.cat([IDS, ANSWER], dim=1)
    mask = torch.cat([MASK, torch.ones_like(ANSWER)], dim=1)
    prompt = torch.cat([MASK, torch.zeros_like(ANSWER)], dim=1).bool()
    keeps = decide(model, pruner, ids, mask, tokens=prompt).keep
    assert keeps[0].equal(decide(model, pruner, IDS, MASK).keep[0])
    assert keeps[1].equal(decide(model, pruner, IDS, MASK).keep[1])


def test_every_prompt_is_decided_anew():
    model = tiny_model("llama")
    pruner = wild(model)
    with attached(model, pruner, "compact") as trace:
        first = step_logits(model, IDS, MASK, ANSWER)
        keep = trace.keep
        step_logits(model, *tiny_prompts(6, seed=9), ANSWER[:1])
        assert [len(k) for k in trace.keep] == [1, 1]
        assert step_logits(model, IDS, MASK, ANSWER).equal(first)
        assert all(a.equal(b) for a, b in zip(keep, trace.keep, strict=True))


def test_gradients_of_the_gates_reach_every_agent():
    model = tiny_model("llama").requires_grad_(False)
    pruner = wild(model, gate=Gate(mode="straight-through", bucket=1))
    with attached(model, pruner):
        cache = model(input_ids=IDS, attention_mask=MASK, use_cache=True).past_key_values
        mask = torch.cat([MASK, MASK[:, -1:]], dim=1)
        model(input_ids=ANSWER[:, :1], attention_mask=mask, past_key_values=cache).logits.pow(2).sum().backward()
    assert [name for name, p in pruner.policy.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_second_attachment_is_refused_here_and_in_another_thread():
    model, other = tiny_model("llama"), tiny_model("llama")
    pruner, caught = uneven(model), []

    def attach():
        try:
            with attached(model, pruner):
                pass
        except MicrogliaError as error:
            caught.append(str(error))

    with attached(model, pruner), attached(other, pruner):
        with pytest.raises(MicrogliaError, match="LlamaForCausalLM is already attached, here or in another thread"):
            attached(model, pruner).__enter__()
        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()
    assert len(caught) == 1
    attach()
    assert len(caught) == 1  # free again


def in_a_thread(work):
    """What `work` raised in a thread of its own, or what it returned."""
    results = []

    def run():
        try:
            results.append(work())
        except MicrogliaError as error:
            results.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_an_answer_is_never_continued_with_the_heads_of_a_later_prompt(execution):
    """Two threads that generate inside one attachment: the first one's answer ends in an error, not in a mixture."""
    model = tiny_model("llama")
    with torch.no_grad(), attached(model, uneven(model), execution):
        first = model(input_ids=IDS, attention_mask=MASK, use_cache=True).past_key_values
        copied = copy.deepcopy(first)
        whole = torch.cat([MASK, MASK[:, -1:]], 1)
        truth = model(input_ids=ANSWER[:, :1], attention_mask=whole, past_key_values=first).logits
        assert model(input_ids=ANSWER[:, :1], attention_mask=whole, past_key_values=copied).logits.equal(truth)
        in_a_thread(lambda: model(input_ids=IDS[:, 1:], attention_mask=MASK[:, 1:], use_cache=True).logits.shape)
        for cache in (first, copied):
            with pytest.raises(MicrogliaError, match="the cache is that of another prompt than the last one"):
                model(input_ids=ANSWER[:, :1], past_key_values=cache)


def test_a_pass_beside_another_threads_pass_is_refused_and_does_not_disturb_it():
    model, caught = tiny_model("llama"), []
    pruner = uneven(model)
    with attached(model, pruner, "compact"):
        truth = step_logits(model, IDS, MASK, ANSWER)

    def meanwhile(*_):
        caught.append(in_a_thread(lambda: model(input_ids=IDS, use_cache=True)))

    handle = model.model.layers[0].mlp.register_forward_hook(meanwhile)
    with attached(model, pruner, "compact"):
        assert step_logits(model, IDS, MASK, ANSWER).equal(truth)
    handle.remove()
    assert len(caught) == 1 + ANSWER.shape[1]
    assert all("two threads run this attached LlamaForCausalLM at the same time" in error for error in caught)


def test_an_unknown_execution_is_refused():
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError, match="execution='half' is unknown; choose captured, compact, fast, dense or masked"
    ):
        attached(model, uneven(model), "half").__enter__()
    with attached(model, uneven(model)):  # nothing was left behind
        step_logits(model, IDS, MASK, ANSWER)


def test_a_cache_from_elsewhere_a_wrong_batch_and_an_empty_prompt_are_refused():
    model = tiny_model("llama")
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with attached(model, uneven(model, 3)) as trace:
        with pytest.raises(MicrogliaError, match="no prompt was read yet"):
            _ = trace.keep_ratio
        with pytest.raises(MicrogliaError, match="read before attaching; start from the whole prompt"):
            model(input_ids=ANSWER[:, :1], past_key_values=cache)
        with pytest.raises(MicrogliaError, match="a prompt without any token was given"):
            model(input_ids=IDS, attention_mask=MASK * torch.tensor([[1], [0], [1]]))
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(MicrogliaError, match="got a batch of 2 rows but decisions for 3"):
            model(input_ids=ANSWER[:2, :1], past_key_values=cache)
