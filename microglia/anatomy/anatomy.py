"""Where everything lives in one transformers model, made once per use; nobody else reads sizes from a config."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from microglia.anatomy.families import FAMILIES, Family
from microglia.anatomy.geometry import HeadGeometry
from microglia.errors import ConfigError, UnsupportedModelError


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model itself, without the wrappers of peft, of compilation or of distributed training."""
    while True:
        if "_orig_mod" in model._modules:  # what torch.compile returns: its code is that of the dense model
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            _check_adapter(model)
            model = model.get_base_model()  # type: ignore[operator]
        elif hasattr(model, "module") and not hasattr(model, "generate"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _check_adapter(model: Any) -> None:
    """Raise UnsupportedModelError for adapters of peft that are more than weights inside the base model."""
    config = getattr(model, "active_peft_config", None)
    if config and (config.is_prompt_learning or getattr(config, "is_adaption_prompt", False)):
        raise UnsupportedModelError(
            f"the adapter is {config.peft_type.value}, which adds tokens of its own to every prompt, and of those "
            "nothing is known here; give the base model, or one with LoRA"
        )


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong; accelerate, which may hold weights elsewhere (on meta), moves them itself."""
    device: torch.device = next(causal_lm(model).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer. `index` is its place in the key/value cache; names are paths from the language model."""

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    family: Family
    heads: HeadGeometry

    @property
    def attention_name(self) -> str:
        return f"{self.name}.{self.family.attention_name}"

    @property
    def mlp_name(self) -> str:
        return f"{self.name}.{self.family.mlp_name}"

    @property
    def scales_by_number(self) -> bool:
        """Whether attention scores are divided by the layer's number, as GPT-2 may be configured to."""
        return bool(getattr(self.attention, "scale_attn_by_inverse_layer_idx", False))

    @property
    def mlp(self) -> nn.Module:
        """The feed-forward half."""
        return self.module.get_submodule(self.family.mlp_name)

    @property
    def down(self) -> nn.Module:
        """The MLP's output projection; its input `(B, T, I)` is where channels are told apart and gated."""
        return self.mlp.get_submodule(self.family.mlp.down)

    @property
    def halves(self) -> tuple[nn.Module, nn.Module]:
        """Attention and MLP."""
        return self.attention, self.mlp

    @property
    def contributions(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs go to the residual stream: attention and MLP, or the norms after them."""
        if not self.family.norms_after:
            return self.halves
        first, second = (self.module.get_submodule(name) for name in self.family.norms_after)
        return first, second

    def norms_around(self, half: int) -> list[nn.Module]:
        """The norms before and after attention (0) or the MLP (1), which nothing else needs."""
        family = self.family
        names = [family.norms[half], *family.norms_after[half : half + 1]]
        return [self.module.get_submodule(name) for name in names]

    @property
    def output(self) -> nn.Module:
        """Attention's output projection; its input `(B, T, H·D)` is where heads are told apart and gated."""
        return self.attention.get_submodule(self.family.attention.o)


class Anatomy:
    """The layers, embeddings and sizes of one decoder model.

    Raises UnsupportedModelError when no attention layer, or not every one, is of a known family.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lm = causal_lm(model)
        self.layers: tuple[Layer, ...] = _layers(self.lm)
        self.family = self.layers[0].family

    @cached_property
    def stack(self) -> nn.Module:
        """The module that runs the layers one after another: the decoder."""
        stack: nn.Module = self.lm.get_submodule(self.layers[0].name.rsplit(".", 2)[0])
        return stack

    @property
    def text_config(self) -> Any:
        """The configuration of the language model; models that also see or hear keep it inside their own."""
        return self.lm.config.get_text_config()

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that the model holds; None where it does not say."""
        return context_length(self.lm)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can say: rows of the output head."""
        return len(self.lm.get_output_embeddings().weight)

    @property
    def attention_backend(self) -> str:
        """The attention implementation that is set: sdpa, eager, …"""
        return str(self.lm.config._attn_implementation)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys that a query of each layer sees, itself included; None where it sees all."""
        config = self.text_config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        if kinds is None:
            return (window,) * len(self.layers)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """`full_attention` or `sliding_attention` for every layer; empty where the family has one kind only."""
        return tuple(getattr(self.text_config, "layer_types", None) or ())

    def check_head_count(self, num_heads: int | None) -> None:
        """Raise ConfigError when the user's head count is not the model's; None means the model's own."""
        actual = sorted({layer.heads.heads for layer in self.layers})
        if num_heads is not None and actual != [num_heads]:
            raise ConfigError(
                f"num_heads={num_heads} was given, but the model has {' or '.join(map(str, actual))} heads "
                f"in its {len(self.layers)} layers; give that number or leave num_heads out"
            )


def context_length(model: nn.Module) -> int | None:
    """Tokens that a model's context holds, by its own configuration; None where it does not say."""
    length = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def token_rows(model: nn.Module) -> int:
    """Tokens that a model can read: rows of its embedding."""
    modules = causal_lm(model).get_input_embeddings().modules()  # peft may have wrapped it
    return next(int(module.num_embeddings) for module in modules if isinstance(module, nn.Embedding))


def _layers(lm: Any) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    unknown: set[str] = set()
    for name, module in lm.named_modules():
        kind = type(module).__name__
        if kind in FAMILIES:
            if not getattr(module, "is_cross_attention", False):
                layers.append(_layer(lm, name, module, FAMILIES[kind], len(layers)))
        elif "Attention" in kind and hasattr(module, "layer_idx"):
            unknown.add(kind)
    if unknown or not layers:
        what = (
            f"attention layers of class {', '.join(sorted(unknown))}"
            if unknown
            else "no attention layer that microglia knows"
        )
        raise UnsupportedModelError(
            f"{type(lm).__name__} has {what}, of which it is not known where q, k, v and o live; "
            f"supported are {', '.join(sorted(FAMILIES))}; to add a family, describe it in "
            "microglia/anatomy/families.py"
        )
    return tuple(layers)


def _layer(lm: Any, name: str, attention: nn.Module, family: Family, place: int) -> Layer:
    """The layer around one attention module of the model."""
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            f"{name} computes attention itself (reorder_and_upcast_attn=True), so its entropy cannot be seen; "
            "set reorder_and_upcast_attn=False in the model's config"
        )
    if missing := _missing(attention, (*family.attention.projections, "head_dim")):
        raise UnsupportedModelError(
            f"{name} is a {type(attention).__name__} without {', '.join(missing)}; this version of transformers stores "
            "its heads elsewhere, use a version in the range that microglia supports"
        )
    owner = name.rpartition(".")[0]
    index = getattr(attention, "layer_idx", None)
    return Layer(
        place if index is None else int(index),
        owner,
        lm.get_submodule(owner),
        attention,
        family,
        family.attention.geometry(attention),
    )


def _missing(module: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if not hasattr(module, name)]
