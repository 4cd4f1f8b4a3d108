"""A training run from start to end: statistics, optional LoRA stage, agents; interruptible and exactly resumable."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from microglia.anatomy import causal_lm, context_length, input_device
from microglia.checkpoint import write_atomically
from microglia.errors import ConfigError, MicrogliaError
from microglia.models import REASONER, source_of
from microglia.passes import Row, batch_of, collate, encode
from microglia.pruner import Pruner
from microglia.reading import joined, read
from microglia.recovery import Recovery
from microglia.tasks.base import Example, Task
from microglia.training.config import TrainingConfig
from microglia.training.continuations import continued
from microglia.training.lora import set_trainable, with_lora
from microglia.training.progress import Report
from microglia.training.saved import STAGE, alone_in, last_whole, load_trained
from microglia.training.sharding import shard_layers
from microglia.training.trained import Trained
from microglia.training.trainer import PruningTrainer

STATISTICS_PROMPTS = 256
SETTINGS, HISTORY = "training_config.json", "history.json"


@dataclass(frozen=True)
class TrainingResult:
    """`model` is the one given, or peft's wrapper around it when LoRA was trained.

    `history` holds the logged values.
    """

    pruner: Pruner
    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its state, and who hears of it.

    resume: go on from the last checkpoint there. on_log: sees every line of the history. quiet: no progress bar.
    """

    path: Path | str
    resume: bool = False
    quiet: bool = False
    on_log: Callable[[dict[str, Any]], None] | None = None


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    pruner: Pruner,
    config: TrainingConfig,
    run: RunFolder,
    *,
    data_dir: Path | str | None = None,
) -> TrainingResult:
    """Train the pruner's policy (in place) on `task`; the base model stays frozen. With LoRA its adapters train too;
    with `config.recovery` the pruner that comes back has a recovery that was trained along.

    Checkpoints go to the run's folder; a run that is resumed goes on from the last one and ends with the same weights
    as an uninterrupted run. In several processes (torchrun) every batch is divided among them, and the run is the one
    that a single process would make. Raises ConfigError when there is nothing to resume, the run was started with other
    options or another is writing there, MicrogliaError when the loss is no longer a number.
    """
    processes.join()
    started = time.monotonic()
    folder = processes.agreed(lambda: Path(run.path))
    config = with_target(config, model, task)
    if config.recovery and pruner.recovery is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            pruner = replace(pruner, recovery=Recovery.for_model(model, config.recovery))
    if pruner.recovery is not None:
        pruner.recovery.requires_grad_(True)
    with alone_in(folder, resume=run.resume):
        _check(pruner, config)
        _remember(folder, pruner, config, run.resume)
        set_seed(config.seed)
        data = _Data.load(model, tokenizer, task, config, data_dir, run)
        model = _prepared(model, config)
        pruner.policy.to(input_device(model))
        history = _run_stages(_Stages(model, config, folder, run, data), pruner)
        if processes.is_first():
            _write(folder / HISTORY, history)
        processes.wait()
    pruner.policy.eval()
    if pruner.recovery is not None:
        pruner.recovery.requires_grad_(False)
    gate = replace(pruner.gate, temperature=config.temperature[1])  # so that its probabilities are those it learned
    return TrainingResult(replace(pruner, gate=gate), model, history, time.monotonic() - started)


def _run_stages(stages: "_Stages", pruner: Pruner) -> list[dict[str, Any]]:
    """Adapters first where that was asked for, then the statistics of prompts, then the policy; returns the history."""
    config, model = stages.config, stages.model
    if config.lora == "first":
        with _training(model):
            stages.run("lora", None, max_steps=config.lora_steps, learning_rate=config.lora_learning_rate)
    if pruner.policy.signals:
        pruner.policy.fit_statistics(stages.data.sample_features(causal_lm(model), pruner))
    with _training(model, adapters=config.lora == "joint", checkpointing=config.gradient_checkpointing):
        history: list[dict[str, Any]] = stages.run(STAGE, pruner).state.log_history
    return history


def _check(pruner: Pruner, config: TrainingConfig) -> None:
    """Raise ConfigError for what cannot be trained together, or not be reported: better known before the work."""
    if pruner.fill == "mean" and config.gradient_checkpointing:
        raise ConfigError("fill='mean' is trained without gradient checkpointing; change one of them")
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"report_to={config.report_to!r} cannot be used ({error}); choose none, tensorboard, wandb or trackio, and "
            "install the package of that name"
        ) from error


def _prepared(model: nn.Module, config: TrainingConfig) -> nn.Module:
    """The model frozen, with fresh adapters where LoRA is trained, its layers divided where that was asked for."""
    lm = causal_lm(model)
    model.requires_grad_(False)
    if config.lora != "none" and lm is model:
        model = with_lora(model, rank=config.lora_rank)
    if config.shard and processes.count() > 1:
        shard_layers(lm, processes.device())
    return model


@contextmanager
def _training(model: nn.Module, *, adapters: bool = True, checkpointing: bool = False) -> Iterator[None]:
    """While inside, adapters have gradients and layers may be computed again; then nothing of the model trains."""
    lm = causal_lm(model)
    set_trainable(model, adapters)
    if checkpointing:
        switch_checkpointing(lm, "enable", {"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            switch_checkpointing(lm, "disable")
        model.requires_grad_(False)
        model.eval()


def examples_of(task: Task, config: TrainingConfig, data_dir: Path | str | None) -> list[list[Example]]:
    """What a training trains on and what it evaluates on."""
    limits = {"train": config.limit, "validation": config.eval_limit}
    return [task.load(split, limit=n, seed=config.seed, data_dir=data_dir) for split, n in limits.items()]


def with_target(config: TrainingConfig, model: nn.Module, task: Task) -> TrainingConfig:
    """The options with the target that they leave open. Raises ConfigError for worked answers where there are none."""
    unlabelled = task.scoring == "text"
    if config.target is None:
        worked = source_of(causal_lm(model)) == REASONER and not unlabelled
        config = replace(config, target="gold" if worked else "model")
    if unlabelled and config.target != "model":
        raise ConfigError(
            f"target={config.target!r} was given, but {task.name} has no worked answers; use target='model'"
        )
    return config


@dataclass(frozen=True)
class _Data:
    """Encoded examples to train and to evaluate on."""

    train: list[Row]
    evaluation: list[Row]

    @classmethod
    def load(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        config: TrainingConfig,
        data_dir: Path | str | None,
        run: RunFolder,
    ) -> "_Data":
        lm = causal_lm(model)
        if any(p.is_meta for p in lm.parameters()):
            raise ConfigError(
                "weights of this model are offloaded, and training needs all of them on a device; load it whole, or "
                "divide it among several processes with shard=True"
            )
        examples = examples_of(task, config, data_dir)
        if config.target == "model":
            every = [example for part in examples for example in part]
            rows = continued(lm, tokenizer, task, every, config, quiet=run.quiet)
            train, evaluation = rows[: len(examples[0])], rows[len(examples[0]) :]
        else:
            train, evaluation = (encode(tokenizer, part, task.template, context_length(lm)) for part in examples)
        return cls(train, evaluation)

    def sample_features(self, lm: nn.Module, pruner: Pruner) -> list[Tensor]:
        """Features of the first training prompts, (N, F) per site."""
        rows = [self.train[i] for i in range(min(STATISTICS_PROMPTS, len(self.train)))]
        batches = [batch_of(rows[start : start + 32], input_device(lm)) for start in range(0, len(rows), 32)]
        return joined([read(lm, batch.prompt, batch.prompt_mask, pruner) for batch in batches]).features


@dataclass(frozen=True)
class _Stages:
    """The stages of a run: each a Trainer of its own, in a folder of its own."""

    model: nn.Module
    config: TrainingConfig
    folder: Path
    how: RunFolder
    data: _Data

    def run(self, stage: str, pruner: Pruner | None, **changes: Any) -> PruningTrainer:
        """Train a stage to its end, from where it was interrupted if it was. `changes`: of the arguments."""
        trained, patience = Trained(self.model, pruner, self.config), self.config.patience
        trainer = PruningTrainer(
            config=self.config,
            model=trained,
            args=_arguments(self.folder / stage, self.config, **changes),
            data_collator=collate,
            train_dataset=self.data.train,
            eval_dataset=self.data.evaluation,
            callbacks=[EarlyStoppingCallback(patience)] if patience and stage == STAGE else None,
        )
        trainer.remove_callback(PrinterCallback)  # prints to stdout, which belongs to results
        trainer.remove_callback(ProgressCallback)
        if processes.is_first():
            trainer.add_callback(Report(self.how.on_log, show=not self.how.quiet))
        last = processes.agreed(lambda: last_whole(self.folder / stage)) if self.how.resume else None
        if last is None or not _finished(state := TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        else:  # transformers would do one more step
            load_trained(trained, Path(state.best_model_checkpoint or last))
            trainer.state = state
        return trainer


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


def switch_checkpointing(lm: nn.Module, switch: str, *arguments: Any) -> None:
    """Gradient checkpointing, which transformers 5.20 or so renamed to activation checkpointing."""
    name = f"activation_checkpointing_{switch}"
    getattr(lm, name if hasattr(lm, name) else f"gradient_checkpointing_{switch}")(*arguments)


def _remember(folder: Path, pruner: Pruner, config: TrainingConfig, resume: bool) -> None:
    """Write down the settings of this run, or check that a resumed run has the same."""
    settings = _settings(config, pruner.fill, processes.count())
    defaults = _settings(TrainingConfig(), "zero", 1)  # of what older versions did not write down
    path = folder / SETTINGS
    if resume:
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds no run to resume; leave --resume out or give the folder of an interrupted run"
            )
        try:
            before = {**defaults, **json.loads(path.read_text())}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete {folder} and start the run again") from error
        if changed := sorted(name for name in settings if before.get(name) != settings[name]):
            listed = ", ".join(f"{name} was {before.get(name)!r} and is now {settings[name]!r}" for name in changed)
            raise ConfigError(
                f"the run in {folder} was started with other options ({listed}); resume with the same ones"
            )
        return
    if folder.is_dir() and any(get_last_checkpoint(str(stage)) for stage in folder.iterdir() if stage.is_dir()):
        raise ConfigError(
            f"{folder} already holds checkpoints of a run; resume it with --resume or give another folder"
        )
    if processes.is_first():
        _write(path, settings)


def _write(path: Path, value: Any) -> None:
    try:
        write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")
    except OSError as error:
        raise MicrogliaError(
            f"{path} cannot be written ({error.strerror}); make room or give another folder"
        ) from error


def _settings(config: TrainingConfig, fill: str, processes: int) -> dict[str, Any]:
    """The settings of a run, as JSON gives them back."""
    return {**json.loads(json.dumps(asdict(config))), "fill": fill, "processes": processes}
