"""A tiny random Llama with a tokenizer of characters, and checkpoints for it, for what needs texts and files."""

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from microglia.checkpoint import Checkpoint
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from tests.tiny import geometries_of, tiny_model

SPECIAL = ("<pad>", "<eos>", "<unk>")
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; knows everything that the arithmetic task writes."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate((*SPECIAL, *LETTERS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tiny_model(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Model and tokenizer in `folder`; `changes` are those of tests.tiny."""
    sizes = {"vocab_size": len(SPECIAL) + len(LETTERS), "max_position_embeddings": 2048, "bos_token_id": None}
    tiny_model("llama", seed=seed, **{**sizes, **changes}).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def opinionated(policy: AgentPolicy, *, seed: int = 0) -> AgentPolicy:
    """The policy with agents that decide differently for every prompt, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    for agent in policy.agents:
        last = agent.network[-1]
        assert isinstance(last, nn.Linear)
        last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
        last.bias.copy_(torch.randn(last.bias.shape, generator=generator) / 2)
    return policy


def opinionated_pruner(model: nn.Module, *, seed: int = 0, **parts) -> Pruner:
    """A pruner of opinionated agents; `parts` are those of Pruner."""
    return Pruner(opinionated(AgentPolicy(geometries_of(model), hidden_dim=16), seed=seed), **parts)


def checkpoint_for(
    model: nn.Module, *, seed: int = 0, template: str = "{question}", training: dict | None = None, **parts
) -> Checkpoint:
    """An unsaved checkpoint of opinionated agents; `parts` are those of Pruner."""
    pruner = opinionated_pruner(model, seed=seed, **parts)
    return Checkpoint.of(model, pruner, base_model="tiny", template=template, training=training)
