"""Train agents (and, on request, LoRA) so that pruned answers stay right."""

from microglia.training.config import TrainingConfig
from microglia.training.loop import RunFolder, TrainingResult, train

__all__ = ["RunFolder", "TrainingConfig", "TrainingResult", "train"]
