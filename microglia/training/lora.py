"""LoRA on the attention and feed-forward projections of a model, through peft."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def with_lora(model: nn.Module, *, rank: int) -> PeftModel:
    """Wrap `model` with fresh adapters on every linear layer but the output head. Nothing else is trainable."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    return wrapped


def set_trainable(model: nn.Module, trainable: bool) -> None:
    """Switch gradients of the adapters on or off; the base model stays frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
