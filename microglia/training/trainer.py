"""The Trainer: transformers' own, with our loss, our curriculum and checkpoints of what is trained only."""

import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from microglia import processes
from microglia.errors import MicrogliaError, first_line
from microglia.training.config import TrainingConfig
from microglia.training.order import ORDER, Order, Ordered
from microglia.training.saved import WEIGHTS, load_trained, readable, seal
from microglia.training.schedule import scheduled
from microglia.training.trained import ScheduleState, Trained


class Curriculum(TrainerCallback):
    """Where α, the temperature, the noise and the target stand.

    From the share of steps done (so resuming needs nothing).
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.now = self.at(0.0)

    def at(self, progress: float) -> ScheduleState:
        """The state when this share of the steps is done."""
        c = self.config
        return ScheduleState(
            alpha=scheduled(c.schedule, c.alpha, progress),
            temperature=scheduled("linear", c.temperature, progress),
            noise=scheduled("linear", c.noise, progress),
            target=None if c.target_share is None else _approached(c.target_share, progress, c.ramp),
            recovers=progress >= c.recovery_start,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = self.at(state.global_step / max(state.max_steps - 1, 1))


def _approached(target: float, progress: float, ramp: float) -> float:
    return scheduled("linear", (1.0, target), progress / ramp) if ramp else target


class PruningTrainer(Trainer):
    """Trainer for a `Trained` module, alone or as one of several processes."""

    def __init__(self, *, config: TrainingConfig, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.curriculum = Curriculum(config)
        self.add_callback(self.curriculum)
        self._order = Order()
        self._gates = ExitStack()  # what must hold until the backward pass is over
        self._sums: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        loss, parts = model(self.curriculum.now, self._gates, **inputs)
        if not torch.isfinite(loss):
            raise MicrogliaError(
                f"the loss became {loss.item()} at step {self.state.global_step}; start again in another folder with a "
                f"lower learning rate (now {self.config.learning_rate}), what was saved before is still in "
                f"{Path(self.args.output_dir or '.').parent}"
            )
        if model.training:
            for name, value in parts.items():
                self._sums[name].append(float(value.detach() if isinstance(value, Tensor) else value))
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with learning rates of their own for LoRA's parameters and the recovery's."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*model)  # which transformers gives from 5.3 or so
        if fresh:
            trained: Any = self.model
            rates = {"lora_": self.config.lora_learning_rate, "recovery.": self.config.recovery_learning_rate}
            for part, rate in rates.items():
                theirs = {id(p) for name, p in trained.named_parameters() if part in name}
                for group in list(optimizer.param_groups):
                    own = [p for p in group["params"] if id(p) in theirs]
                    if own:
                        group["params"] = [p for p in group["params"] if id(p) not in theirs]
                        optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._gates:
            return super().training_step(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self._gates:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None  # type: ignore[union-attr]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        super().log(
            {name: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for name, v in logs.items()},
            *args,
            **kwargs,
        )

    # --- several processes --------------------------------------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        return None if sampler is None else Ordered(sampler, self._order)

    def get_train_dataloader(self) -> DataLoader:
        return _whole_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _whole_batches(super().get_eval_dataloader(*args, **kwargs))

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """DistributedDataParallel around what trains; what is frozen needs neither copying nor comparing."""
        if not training or processes.count() == 1 or isinstance(model, DistributedDataParallel):
            return model
        still = {name for name, p in model.named_parameters() if not p.requires_grad}
        still |= {name for name, _ in model.named_buffers()}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(still))
        return DistributedDataParallel(model)

    # --- checkpoints hold what is trained, not the base model ---------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
            processes.wait()  # each writes the state of its random numbers
            if processes.is_first():
                seal(folder)
        except Exception as error:  # torch, safetensors and the system raise their own kinds
            raise MicrogliaError(
                f"{folder} cannot be written ({first_line(error)}); make room there and go on with --resume from "
                "the checkpoint before it"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        trained: Trained = self.accelerator.unwrap_model(self.model)
        save_file(trained.trained_state(), folder / WEIGHTS)
        if self._order.start is not None:
            save_file({"start": self._order.start}, folder / ORDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))
        with readable(resume_from_checkpoint):
            path = Path(resume_from_checkpoint) / ORDER  # which runs that older versions started have not
            self._order.again = load_file(path)["start"] if path.is_file() else None

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            load_trained(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    # transformers keeps these in torch's format; it loads them with weights_only, so nothing pickled is run.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._order.again = None  # called before the first batch of an epoch, or after it when one is gone on with
        with readable(checkpoint or ""):
            super()._load_rng_state(checkpoint)


def _whole_batches(loader: DataLoader) -> DataLoader:
    """Let every process read whole batches, of which it takes its rows itself: the batches that one alone would see."""
    sampler = loader.batch_sampler
    if isinstance(sampler, BatchSamplerShard):
        sampler.num_processes, sampler.process_index = 1, 0
        sampler.even_batches = False  # it would fill up the last batch
    return loader
