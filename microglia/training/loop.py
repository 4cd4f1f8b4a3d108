"""A training run from start to end: statistics, optional LoRA stage, agents; interruptible and exactly resumable."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from microglia import processes
from microglia.checkpoint import write_atomically
from microglia.errors import ConfigError, MicrogliaError
from microglia.look import Look
from microglia.policy import AgentPolicy, Policy
from microglia.sites import causal_lm, input_device
from microglia.tasks.base import Task
from microglia.training.config import TrainingConfig
from microglia.training.data import Batch, Collator, encode
from microglia.training.lora import set_trainable, with_lora
from microglia.training.passes import prompt_features
from microglia.training.progress import Report
from microglia.training.saved import STAGE, alone_in_its_folder, last_whole, load_trained
from microglia.training.sharding import shard_layers
from microglia.training.trained import Trained
from microglia.training.trainer import PruningTrainer

STATISTICS_PROMPTS = 256
TOLD, HISTORY = "training_config.json", "history.json"


@dataclass(frozen=True)
class TrainingResult:
    """`model` is the one given, or peft's wrapper around it when LoRA was trained.

    `history` holds the logged values.
    """

    policy: Policy
    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float


@alone_in_its_folder
def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    policy: Policy,
    config: TrainingConfig,
    *,
    output_dir: Path | str,
    look: Look | None = None,
    bucket: int | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train `policy` (in place) on `task`; the base model stays frozen, with LoRA its adapters may train too.

    Checkpoints go to `output_dir`; with `resume=True` the run goes on from the last one and ends with the same weights
    as an uninterrupted run. `on_log` sees every line of the history. In several processes (torchrun) every batch is
    divided among them, and the run is the one that a single process would make. Raises ConfigError when there is
    nothing to resume, the run was told otherwise or another is writing there, MicrogliaError when the loss is no longer
    a number.
    """
    processes.join()
    _check_report(config.report_to)
    folder, look, started = processes.agreed(lambda: Path(output_dir)), look or Look(), time.monotonic()
    _remember(folder, config, resume)
    set_seed(config.seed)
    lm = causal_lm(model)
    if any(p.is_meta for p in lm.parameters()):
        raise ConfigError(
            "weights of this model are offloaded, and training needs all of them on a device; load it whole, or divide "
            "it among several processes with shard=True"
        )
    room = getattr(lm.config, "max_position_embeddings", None)
    train_data = encode(
        tokenizer, task.load("train", limit=config.limit, seed=config.seed, data_dir=data_dir), task.template, room
    )
    eval_data = encode(
        tokenizer,
        task.load("validation", limit=config.eval_limit, seed=config.seed, data_dir=data_dir),
        task.template,
        room,
    )
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    model.requires_grad_(False)
    if config.lora != "none" and lm is model:
        model = with_lora(model, rank=config.lora_rank)
    if config.shard and processes.count() > 1:
        shard_layers(lm, processes.device())
    policy.to(input_device(lm))

    def run(stage: str, policy: Policy | None, **changes: Any) -> PruningTrainer:
        arguments = _arguments(folder / stage, config, **changes)
        trained = Trained(model, policy, config, look=look, bucket=bucket)
        trainer = PruningTrainer(
            config=config,
            model=trained,
            args=arguments,
            data_collator=Collator(pad),
            train_dataset=train_data,
            eval_dataset=eval_data,
            callbacks=[EarlyStoppingCallback(config.patience)] if config.patience and stage == STAGE else None,
        )
        trainer.remove_callback(PrinterCallback)  # prints to stdout, which belongs to results
        trainer.remove_callback(ProgressCallback)
        if processes.is_first():
            trainer.add_callback(Report(on_log, show=not quiet))
        last = processes.agreed(lambda: last_whole(folder / stage)) if resume else None
        if last is None or not _finished(state := TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        else:  # transformers would do one more step
            load_trained(trained, Path(state.best_model_checkpoint or last))
            trainer.state = state
        return trainer

    if config.lora == "first":
        set_trainable(model, True)
        steps = {"max_steps": config.lora_steps, "learning_rate": config.lora_learning_rate}
        run("lora", None, **steps)
        set_trainable(model, False)
    if isinstance(policy, AgentPolicy):
        policy.fit_statistics(_sample_features(lm, train_data, policy, look, Collator(pad)))
    if config.lora == "joint":
        set_trainable(model, True)
    if config.gradient_checkpointing:
        checkpointing(lm, "enable", {"use_reentrant": False})
    try:
        trainer = run(STAGE, policy)
    finally:
        if config.gradient_checkpointing:
            checkpointing(lm, "disable")
        model.requires_grad_(False)
        model.eval()
    history = trainer.state.log_history
    if processes.is_first():
        _write(folder / HISTORY, history)
    processes.wait()
    return TrainingResult(policy.eval(), model, history, time.monotonic() - started)


def _finished(state: TrainerState) -> bool:
    """Whether a stage had made its last step, or was stopped early, when this was saved."""
    callbacks: Any = state.stateful_callbacks or {}  # a dict once it was saved; its annotation says a list
    control = callbacks.get("TrainerControl", {})
    return state.global_step >= state.max_steps or bool(control.get("args", {}).get("should_training_stop"))


def _arguments(folder: Path, config: TrainingConfig, **changes: Any) -> TrainingArguments:
    stop_early = config.patience > 0
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",  # easy and hard in one batch: the keep ratio is steered over all of them
        "logging_steps": 10,
        "eval_strategy": "steps" if stop_early else "no",
        "eval_steps": config.eval_steps,
        "save_steps": config.eval_steps if stop_early else config.save_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": stop_early,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "remove_unused_columns": False,
        "label_names": [],
        "report_to": config.report_to,
        "use_cpu": not torch.cuda.is_available(),
        "seed": config.seed,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = TrainingArguments(**(options | changes))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: DataParallel would copy the model every step
    return arguments


def _check_report(report_to: str) -> None:
    """Raise ConfigError unless transformers can report there: better known before the work than after."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"report_to={report_to!r} cannot be used ({error}); choose none, tensorboard, wandb or trackio, and "
            "install the package of that name"
        ) from error


def checkpointing(lm: nn.Module, switch: str, *arguments: Any) -> None:
    """Gradient checkpointing, which transformers 5.20 or so renamed to activation checkpointing."""
    name = f"activation_checkpointing_{switch}"
    getattr(lm, name if hasattr(lm, name) else f"gradient_checkpointing_{switch}")(*arguments)


def _remember(folder: Path, config: TrainingConfig, resume: bool) -> None:
    """Write down what this run is told, or check that a resumed run is told the same."""
    told, usual = _told(config, processes.count()), _told(TrainingConfig(), 1)
    path = folder / TOLD
    if resume:
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds no run to resume; leave --resume out or give the folder of an interrupted run"
            )
        try:
            before = {**usual, **json.loads(path.read_text())}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete {folder} and start the run again") from error
        if changed := sorted(name for name in told if before.get(name) != told[name]):
            listed = ", ".join(f"{name} was {before.get(name)!r} and is now {told[name]!r}" for name in changed)
            raise ConfigError(
                f"the run in {folder} was started with other options ({listed}); resume with the same ones"
            )
        return
    if folder.is_dir() and any(get_last_checkpoint(str(stage)) for stage in folder.iterdir() if stage.is_dir()):
        raise ConfigError(
            f"{folder} already holds checkpoints of a run; resume it with --resume or give another folder"
        )
    if processes.is_first():
        _write(path, told)


def _write(path: Path, value: Any) -> None:
    try:
        write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")
    except OSError as error:
        raise MicrogliaError(
            f"{path} cannot be written ({error.strerror}); make room or give another folder"
        ) from error


def _told(config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What a run is told, as JSON gives it back."""
    return {**json.loads(json.dumps(asdict(config))), "processes": processes}


def _sample_features(lm: nn.Module, data: Any, policy: Policy, look: Look, collate: Collator) -> list[Tensor]:
    """Features of the first training prompts, (N, F) per site."""
    seen: list[list[Tensor]] = []
    rows = [data[i] for i in range(min(STATISTICS_PROMPTS, len(data)))]
    for start in range(0, len(rows), 32):
        batch = {name: x.to(input_device(lm)) for name, x in collate(rows[start : start + 32]).items()}
        seen.append(prompt_features(lm, Batch(**batch), policy, look))
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]
