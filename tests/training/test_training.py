"""Whole runs on a tiny model: they learn, resume exactly, stop with a sentence, and lose nothing."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from microglia.errors import ConfigError, MicrogliaError
from microglia.policies import AgentPolicy, StaticPolicy
from microglia.pruner import Pruner
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.training import RunFolder, TrainingConfig, train
from tests.tiny import geometries_of, tiny_model
from tests.tiny_folder import character_tokenizer, save_tiny_model

SHORT = TrainingConfig(max_steps=6, batch_size=4, limit=24, eval_limit=8, save_steps=3, warmup_steps=0, target="gold")


def tiny_run(folder, config, *, policy=None, model=None, fill="zero", resume=False, on_log=None):
    """Train in a folder; the model and the result."""
    tokenizer = character_tokenizer()
    model = model or tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    torch.manual_seed(5)
    pruner = Pruner(policy or AgentPolicy(geometries_of(model), hidden_dim=8), fill=fill)
    run = RunFolder(folder, resume, quiet=True, on_log=on_log)
    return model, train(model, tokenizer, get_task("arithmetic"), pruner, config, run)


def trained_policy(folder, config, **options):
    """The policy after `tiny_run`."""
    return tiny_run(folder, config, **options)[1].pruner.policy


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_only_the_policy_changes_and_the_history_tells(tmp_path):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fresh = AgentPolicy(geometries_of(model), hidden_dim=8)
    start = {name: x.clone() for name, x in fresh.state_dict().items()}
    lines = []
    config = TrainingConfig(**{**vars(SHORT), "max_steps": 10})
    _, result = tiny_run(tmp_path, config, policy=fresh, model=model, on_log=lines.append)
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    assert all(not x.equal(start[name]) for name, x in result.pruner.policy.state_dict().items() if "network" in name)
    logged = [row for row in result.history if "task" in row]
    assert logged
    assert {"keep_ratio", "alpha", "temperature", "noise", "gate_entropy"} <= set(logged[0])
    assert [row for row in lines if "task" in row]
    assert result.pruner.policy is fresh


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole = trained_policy(tmp_path / "whole", SHORT)

    passes = []

    def interrupt_after_a_checkpoint(model, args, output):
        passes.append(1)
        if len(passes) == 10:  # one pass for statistics, two a step: in the fifth, after the checkpoint of the third
            raise KeyboardInterrupt

    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    handle = model.model.layers[0].register_forward_hook(interrupt_after_a_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "cut", SHORT, model=model)
    handle.remove()
    assert list((tmp_path / "cut" / "agents").glob("checkpoint-*"))
    resumed = trained_policy(tmp_path / "cut", SHORT, resume=True)
    assert same(whole, resumed)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_run_is_resumed_exactly_at_any_step_of_any_epoch(tmp_path, step):
    """Three epochs of two steps, whose examples come in another order each time."""
    config = replace(SHORT, limit=8, save_steps=1)
    whole = trained_policy(tmp_path / "whole", config)
    last = f"agents/checkpoint-{step}/sha256.json"

    def interrupt(*_):
        if (tmp_path / "cut" / last).exists():
            raise KeyboardInterrupt

    model = tiny_model("llama", vocab_size=len(character_tokenizer()), max_position_embeddings=2048)
    handle = model.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) if step < 6 else nullcontext():
        tiny_run(tmp_path / "cut", config, model=model)
    handle.remove()
    assert same(whole, trained_policy(tmp_path / "cut", config, resume=True))


@pytest.mark.parametrize("changes", [{"max_steps": 8}, {"max_steps": 40, "eval_steps": 2, "patience": 1}])
def test_resuming_a_finished_run_changes_nothing(tmp_path, changes):
    """Killed between its last save and its end, say; the second kind is stopped early and keeps the best."""
    config = TrainingConfig(**{**vars(SHORT), "save_steps": 1, **changes})
    _, first = tiny_run(tmp_path, config)
    _, again = tiny_run(tmp_path, config, resume=True)
    assert same(first.pruner.policy, again.pruner.policy)
    assert again.history == first.history[: len(again.history)]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    first = trained_policy(tmp_path / "a", SHORT)
    again = trained_policy(tmp_path / "b", SHORT)
    other = trained_policy(tmp_path / "c", TrainingConfig(**{**vars(SHORT), "seed": 1}))
    assert same(first, again)
    assert not same(first, other)


def test_alpha_prunes_and_a_target_is_reached(tmp_path):
    def mask():
        return StaticPolicy.all_kept(geometries_of(tiny_model("llama")))

    base = {**vars(SHORT), "max_steps": 60, "learning_rate": 0.15, "noise": (0.5, 0.0), "save_steps": 1000}
    free = tiny_run(tmp_path / "free", TrainingConfig(**{**base, "alpha": (0.0, 0.0)}), policy=mask())[1].history
    pressed = tiny_run(tmp_path / "pressed", TrainingConfig(**{**base, "alpha": (5.0, 5.0)}), policy=mask())[1].history
    steered = tiny_run(tmp_path / "steered", TrainingConfig(**{**base, "keep_ratio": 0.5}), policy=mask())[1].history
    last = [[row["keep_ratio"] for row in h if "keep_ratio" in row][-1] for h in (free, pressed, steered)]
    assert last[1] < 0.3 < last[0]
    assert last[2] == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("lora", ["first", "joint"])
def test_lora_trains_adapters_and_leaves_the_base(tmp_path, lora):
    config = TrainingConfig(**{**vars(SHORT), "lora": lora, "lora_steps": 3, "lora_rank": 2})
    _, result = tiny_run(tmp_path, config)
    adapters = {n: p for n, p in result.model.named_parameters() if "lora_B" in n}
    assert adapters
    assert all(p.abs().sum() > 0 for p in adapters.values())
    reference = tiny_model("llama", vocab_size=len(character_tokenizer()), max_position_embeddings=2048)
    base = result.model.unload().state_dict()
    assert all(x.equal(base[name]) for name, x in reference.state_dict().items())


def test_joint_adapters_and_agents_learn_at_their_own_rates(tmp_path):
    """With a rate of zero for the adapters they stay where they started, while the agents move; and the reverse."""
    moved = {}
    for frozen, rates in {"adapters": (1e-2, 1e-30), "agents": (1e-30, 1e-2)}.items():
        changes = {"lora": "joint", "lora_rank": 2, "learning_rate": rates[0], "lora_learning_rate": rates[1]}
        _, result = tiny_run(tmp_path / frozen, TrainingConfig(**{**vars(SHORT), **changes}))
        adapters = [p.abs().max() for n, p in result.model.named_parameters() if "lora_B" in n]  # start at zero
        start = AgentPolicy(geometries_of(result.model)).agents[0].network[-1].bias
        agents = (result.pruner.policy.agents[0].network[-1].bias - start).abs().max()
        moved[frozen] = (max(adapters).item(), agents.item())
    assert moved["adapters"][0] < 1e-20 < 1e-4 < moved["adapters"][1]
    assert moved["agents"][1] < 1e-20 < 1e-4 < moved["agents"][0]


def test_gradient_checkpointing_changes_the_memory_and_not_the_weights(tmp_path):
    config = {**vars(SHORT), "max_steps": 3, "target": "0.5"}
    plain = trained_policy(tmp_path / "plain", TrainingConfig(**config))
    again = trained_policy(tmp_path / "checkpointed", TrainingConfig(**{**config, "gradient_checkpointing": True}))
    for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_early_stopping_keeps_the_best(tmp_path):
    config = TrainingConfig(
        **{**vars(SHORT), "max_steps": 40, "eval_steps": 2, "patience": 1, "alpha": (0.0, 0.0), "learning_rate": 1e-9}
    )
    result = tiny_run(tmp_path, config)[1]
    evaluations = [row for row in result.history if "eval_loss" in row]
    assert 2 <= len(evaluations) < 20


def test_a_loss_that_is_not_a_number_stops_with_a_sentence(tmp_path):
    model = tiny_model("llama", vocab_size=len(character_tokenizer()), max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(MicrogliaError, match=r"loss became nan at step 0; start again in another folder") as caught:
        tiny_run(tmp_path, SHORT, model=model)
    assert str(caught.value).endswith(f"what was saved before is still in {tmp_path}")


@pytest.mark.parametrize("where", ["diary", "trackio"])
def test_a_report_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, monkeypatch, where):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"report_to='{where}' cannot be used .*; choose none, tensorboard, wandb"):
        tiny_run(tmp_path / "run", TrainingConfig(**{**vars(SHORT), "report_to": where}))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_means_of_pruned_heads_are_trained_but_not_with_gradient_checkpointing(tmp_path):
    mean, zero = (trained_policy(tmp_path / fill, SHORT, fill=fill) for fill in ("mean", "zero"))
    assert not same(mean, zero)
    with pytest.raises(ConfigError, match="fill='mean' is trained without gradient checkpointing; change one of them"):
        tiny_run(tmp_path / "run", replace(SHORT, gradient_checkpointing=True), fill="mean")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_runs_are_not_mixed_up(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        tiny_run(tmp_path / "none", SHORT, resume=True)
    tiny_run(tmp_path / "done", SHORT)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        tiny_run(tmp_path / "done", SHORT)
    with pytest.raises(ConfigError, match="seed was 0 and is now 3"):
        tiny_run(tmp_path / "done", TrainingConfig(**{**vars(SHORT), "seed": 3}), resume=True)
    with pytest.raises(ConfigError, match="fill was 'zero' and is now 'mean'"):
        tiny_run(tmp_path / "done", SHORT, fill="mean", resume=True)
    assert json.loads((tmp_path / "done" / "training_config.json").read_text())["batch_size"] == 4


def test_what_is_trained_is_shown_at_the_temperature_that_training_ended_with(tmp_path):
    system = MicrogliaPruningSystem(save_tiny_model(tmp_path / "model"), hidden_dim=4)
    few = {"max_steps": 1, "batch_size": 2, "limit": 4, "eval_limit": 2, "quiet": True}
    system.train("arithmetic", temperature=(2.0, 1.5), output_dir=tmp_path / "saved", **few)
    saved = MicrogliaPruningSystem.from_pretrained(tmp_path / "saved", system.source)
    shown = saved.explain("What is 1 + 2?").sites[0]
    assert shown.probability == pytest.approx(torch.sigmoid(torch.tensor(shown.logit) / 1.5).tolist(), abs=1e-5)


def test_the_price_of_a_head_rises_alike_whatever_the_learning_rate(tmp_path):
    """Agents and their static baseline learn at other rates; too many kept heads must cost both the same."""
    prices = []
    for rate in (1e-9, 1e-7):
        config = replace(SHORT, max_steps=10, keep_ratio=0.5, ramp=0.0, learning_rate=rate, noise=(0.0, 0.0))
        _, result = tiny_run(tmp_path / str(rate), config)
        prices.append(next(row["multiplier"] for row in result.history if "multiplier" in row))
    assert prices[0] == prices[1] > 0.1
