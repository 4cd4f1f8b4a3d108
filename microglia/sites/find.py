"""Find the attention sites of a model, or say in one sentence why it is not supported."""

import torch
from torch import nn

from microglia.errors import ConfigError, UnsupportedModelError
from microglia.sites.families import FAMILIES
from microglia.sites.site import Site


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, without the wrappers of peft or of distributed training."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif hasattr(model, "module") and not hasattr(model, "generate"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong; accelerate, which may hold weights elsewhere (on meta), moves them itself."""
    device = next(causal_lm(model).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """All attention sites of a decoder model, in order of depth.

    Raises UnsupportedModelError when no layer, or not every attention layer, is of a known family.
    """
    sites: list[Site] = []
    unknown: set[str] = set()
    for name, module in causal_lm(model).named_modules():
        kind = type(module).__name__
        if kind in FAMILIES:
            if getattr(module, "is_cross_attention", False):
                continue
            if getattr(module, "reorder_and_upcast_attn", False):
                raise UnsupportedModelError(
                    f"{name} computes attention itself (reorder_and_upcast_attn=True), so its entropy cannot be seen; "
                    "set reorder_and_upcast_attn=False in the model's config"
                )
            layout = FAMILIES[kind]
            missing = [p for p in (*layout.projections, "head_dim") if not hasattr(module, p)]
            if missing:
                raise UnsupportedModelError(
                    f"{name} is a {kind} without {', '.join(missing)}; this version of transformers stores its heads "
                    "elsewhere, use a version in the range that microglia supports"
                )
            layer = int(getattr(module, "layer_idx", None) or len(sites))
            sites.append(Site(len(sites), layer, name, module, layout, layout.geometry(module)))
        elif "Attention" in kind and hasattr(module, "layer_idx"):
            unknown.add(kind)
    if unknown or not sites:
        found = (
            f"attention layers of class {', '.join(sorted(unknown))}"
            if unknown
            else "no attention layer that microglia knows"
        )
        raise UnsupportedModelError(
            f"{type(causal_lm(model)).__name__} has {found}, of which it is not known where q, k, v and o live; "
            f"supported are {', '.join(sorted(FAMILIES))}; to add a family, describe it in microglia/sites/families.py"
        )
    return tuple(sites)


def check_head_count(sites: tuple[Site, ...], num_heads: int | None) -> None:
    """Raise ConfigError when the user's head count is not the model's; None means the model's own."""
    actual = sorted({site.geometry.heads for site in sites})
    if num_heads is not None and actual != [num_heads]:
        raise ConfigError(
            f"num_heads={num_heads} was given, but the model has {' or '.join(map(str, actual))} heads "
            f"in its {len(sites)} sites; give that number or leave num_heads out"
        )
