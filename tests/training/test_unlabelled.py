"""Whole trainings without labels on a tiny model: what is learned from, where recovery acts, and exact resumption."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from microglia.attach import attached
from microglia.checkpoint import Checkpoint
from microglia.checkpoint.files import AGENTS
from microglia.errors import CheckpointError, ConfigError
from microglia.execution import Decision, Masked
from microglia.export import KeepPlan
from microglia.export.frozen import frozen
from microglia.generation import generate
from microglia.passes import Batch, answer_logits, collate
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.recovery import Recovery
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import RunFolder, TrainingConfig, train
from microglia.training.static_baseline import baseline_config, new_static_baseline, train_in_memory
from microglia.units import find_sites
from tests.tiny import geometries_of, step_logits, tiny_model, tiny_prompts, tiny_tokenizer, wild
from tests.tiny_folder import character_tokenizer, save_tiny_model
from tests.training.test_written import moved

SHORT = TrainingConfig(
    max_steps=6, batch_size=4, limit=8, eval_limit=4, save_steps=1, warmup_steps=0, continuation_tokens=7, recovery=2
)


def tiny_llama():
    return tiny_model("llama", vocab_size=len(character_tokenizer()), max_position_embeddings=2048)


def tiny_run(folder, config, *, model=None, resume=False, task="prompts"):
    model = model or tiny_llama()
    torch.manual_seed(5)
    pruner = Pruner(AgentPolicy(geometries_of(model), hidden_dim=8))
    return train(model, character_tokenizer(), get_task(task), pruner, config, RunFolder(folder, resume, quiet=True))


def state(result):
    return result.pruner.policy.state_dict() | result.pruner.recovery.state_dict()


def test_prompts_are_enough_and_the_model_stays_as_it_was(tmp_path):
    model = tiny_llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result = tiny_run(tmp_path, replace(SHORT, max_steps=10), model=model)
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    logged = [row for row in result.history if "kl" in row]
    assert logged
    assert all(float(x.abs().sum()) > 0 for name, x in state(result).items() if name.startswith(("up.", "norms.")))
    assert json.loads((tmp_path / "training_config.json").read_text())["target"] == "model"


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_with_recovery_is_resumed_exactly(tmp_path, step):
    config = replace(SHORT, continuation_temperature=1.0, recovery_start=0.5)
    whole = state(tiny_run(tmp_path / "whole", config))

    def interrupt(*_):
        if (tmp_path / "cut" / f"agents/checkpoint-{step}/sha256.json").exists():
            raise KeyboardInterrupt

    model = tiny_llama()
    handle = model.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "cut", config, model=model)
    handle.remove()
    again = state(tiny_run(tmp_path / "cut", config, resume=True))
    assert all(x.equal(again[name]) for name, x in whole.items())


def test_agents_first_then_both(tmp_path):
    late = tiny_run(tmp_path / "late", replace(SHORT, recovery_start=1.0, max_steps=3))
    ups = [float(x.abs().sum()) for name, x in state(late).items() if name.startswith("up.")]
    assert max(ups) > 0  # the last step alone
    assert all(float(x.detach().abs().max()) < 3e-4 for x in late.pruner.recovery.up)  # one step at a falling rate


def test_the_static_baseline_gets_the_same_recovery():
    model = tiny_llama()
    config = baseline_config(SHORT)
    assert config.recovery == SHORT.recovery
    pruner = new_static_baseline(model)
    result = train_in_memory(model, character_tokenizer(), get_task("prompts"), pruner, config)
    assert all(float(x.detach().abs().sum()) > 0 for x in result.pruner.recovery.up)


def test_worked_answers_are_asked_for_only_where_there_are_some(tmp_path):
    with pytest.raises(ConfigError, match="target='gold' was given, but prompts has no worked answers; use target='mo"):
        tiny_run(tmp_path, replace(SHORT, target="gold"))
    result = tiny_run(tmp_path / "mixed", replace(SHORT, target="0.5", max_steps=10), task="arithmetic")
    row = next(row for row in result.history if "kl" in row)
    assert row["task"] > row["kl"] > 0


# --- recovery at inference ---------------------------------------------------------------------------------------


def projections(model):
    """Every matrix of a layer, by name; GPT-2 calls its own c_… and stores them the other way round."""
    return [(n, m) for n, m in model.named_modules() if n.endswith("_proj") or ".c_" in n]


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_the_prompt_is_read_by_the_untouched_model_and_the_answer_by_the_recovered_one(family, execution):
    """Against the same weights put into a second model by hand."""
    model, other = tiny_model(family), tiny_model(family)
    recovery = moved(Recovery.for_model(model, 3))
    for (name, module), low in zip(projections(other), zip(recovery.down, recovery.up, strict=True), strict=True):
        product = 2 * low[1] @ low[0]
        module.weight.data += product.T if "c_" in name else product
    norms = [m for m in other.modules() if type(m).__name__.endswith("Norm")]
    for norm, more in zip(norms, recovery.norms, strict=True):
        norm.weight.data += more
    pruner = wild(model, recovery=recovery)
    ids, mask = tiny_prompts(9, 9)
    answer = torch.randint(2, 97, (2, 4), generator=torch.Generator().manual_seed(2))
    with attached(model, replace(pruner, recovery=None)) as plain_trace:
        plain = step_logits(model, ids, mask, answer)
    with attached(model, pruner, execution) as trace:
        recovered = step_logits(model, ids, mask, answer)
    assert all(a.equal(b) for a, b in zip(trace.keep, plain_trace.keep, strict=True))
    assert recovered[:, 0].equal(plain[:, 0])
    assert (recovered[:, 1:] - plain[:, 1:]).abs().max() > 1e-3
    first = model(input_ids=ids, attention_mask=mask, use_cache=True)
    with Masked().apply(find_sites(other), Decision(trace.keep)):
        truth = other(input_ids=answer, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(recovered[:, 1:], truth, atol=2e-4, rtol=0)


def test_leaving_restores_the_model(family, snapshot):
    model = tiny_model(family)
    before = snapshot(model)
    pruner = wild(model, recovery=moved(Recovery.for_model(model, 3)))
    for execution in ("masked", "compact"):
        ids, mask = tiny_prompts(9, 4)
        with attached(model, pruner, execution):
            step_logits(model, ids, mask, ids[:, -2:])
        assert snapshot(model) == before


def test_merged_weights_follow_what_was_learned_since():
    model = tiny_model("llama")
    pruner = wild(model, recovery=moved(Recovery.for_model(model, 3)))
    batch = Batch(**collate([{"prompt": [5, 6, 7], "answer": [8, 9, 10, 11]}]))
    for _ in range(2):
        with torch.no_grad():
            masked, compact = (answer_logits(model, batch, pruner, how)[0] for how in ("masked", "compact"))
            torch.testing.assert_close(masked, compact, atol=1e-4, rtol=0)
            for parameter in pruner.recovery.parameters():
                parameter.mul_(1.5)


def test_captured_steps_refuse_a_recovery():
    model = tiny_model("llama")
    pruner = wild(model, recovery=Recovery.for_model(model, 2))
    with pytest.raises(
        ConfigError, match=r"execution='captured' writes with the model's own weights, .* use execution"
    ):
        generate(model, tiny_tokenizer(), ["abc"], pruner, execution="captured", max_new_tokens=3)


def test_a_recovery_is_saved_with_the_pruner_and_loaded_again(tmp_path):
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path / "model"), hidden_dim=4, least_kept=0.3)
    options = vars(replace(SHORT, max_steps=3, start="norm"))
    system.train("prompts", output_dir=tmp_path / "saved", quiet=True, **options)
    again = MicrogliaPruningSystem.from_pretrained(tmp_path / "saved", system.source)
    assert again.pruner.gate.least_kept == 0.3
    assert again.pruner.fingerprint() == system.pruner.fingerprint()
    assert again.generate("How are you?", 8) == system.generate("How are you?", 8)
    other = save_tiny_model(tmp_path / "other", intermediate_size=32)
    with pytest.raises(CheckpointError, match="the recovery of this checkpoint was made for layers of other sizes"):
        MicrogliaPruningSystem.from_pretrained(tmp_path / "saved", other)


@pytest.mark.parametrize("damage", ["a part is gone", "another rank", "not a number"])
def test_a_damaged_recovery_is_refused(tmp_path, damage):
    model = tiny_model("llama")
    checkpoint = Checkpoint.of(model, wild(model, recovery=Recovery.for_model(model, 2)), base_model="tiny")
    checkpoint.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / AGENTS)
    if damage == "a part is gone":
        del tensors["recovery.down.1"]
    elif damage == "another rank":
        tensors["recovery.down.0"] = torch.zeros(3, tensors["recovery.down.0"].shape[1])
    else:
        tensors["recovery.norms.0"].fill_(float("nan"))
    save_file(tensors, tmp_path / AGENTS)
    config = json.loads((tmp_path / "microglia_config.json").read_text())
    config["sha256"] = {AGENTS: hashlib.sha256((tmp_path / AGENTS).read_bytes()).hexdigest()}
    (tmp_path / "microglia_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit microglia_config.json: .*recovery"):
        Checkpoint.from_pretrained(tmp_path)


def test_a_frozen_model_has_the_recovery_in_its_weights():
    model = tiny_model("llama")
    recovery = moved(Recovery.for_model(model, 3))
    plan = KeepPlan("mean", tuple(torch.tensor([1.0, 0] * 4) for _ in range(2)), 1, 0.0, 0.5)
    ids, _ = tiny_prompts(9)
    with torch.no_grad():
        with frozen(model, plan, recovery) as small:
            written = small(input_ids=ids).logits
        with recovery.applied(model, merged=False), frozen_by_gates(model, plan):
            truth = model(input_ids=ids).logits
        with frozen(model, plan) as small:
            without = small(input_ids=ids).logits
    torch.testing.assert_close(written, truth, atol=2e-4, rtol=0)
    assert (written - without).abs().max() > 1e-2


def frozen_by_gates(model, plan):
    return Masked().apply(find_sites(model), Decision([keep[None] for keep in plan.keep]))
