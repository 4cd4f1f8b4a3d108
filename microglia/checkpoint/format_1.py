"""Checkpoints of format 1, which microglia 0.1 wrote: heads only, with two modes that are gone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from microglia.errors import CheckpointError

SIGNALS = {"both": ["norm", "entropy"], "norm": ["norm"], "entropy": ["entropy"]}
WITH_HIDDEN_DIM = ("agents", "mixture", "predictor")


def upgraded(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration of format 1 in today's words. Raises CheckpointError for what no longer exists."""
    row: dict[str, Any] = {"promise": {}, **saved}  # which the first checkpoints did not have
    for name, kept in (("scope", "answer"), ("norm", "head")):
        if (given := row.pop(name, kept)) != kept:
            raise CheckpointError(
                f"{where} was trained with {name}={given!r}, a mode of the original project that microglia no "
                "longer has; use it with microglia 0.1.0, or train again"
            )
    features, hidden_dim, sites = row.pop("features", None), row.pop("hidden_dim", None), row.get("sites")
    right = {
        f"features={features!r}": isinstance(features, str) and features in SIGNALS,
        f"hidden_dim={hidden_dim!r}": type(hidden_dim) is int and hidden_dim > 0,
        f"sites={sites!r}": isinstance(sites, list),
    }
    if wrong := [given for given, is_right in right.items() if not is_right]:
        raise CheckpointError(f"{where} has the wrong {', '.join(wrong)}; copy or save the checkpoint again")
    return {
        **row,
        "sites": [_site(site) for site in row["sites"]],
        "signals": [] if row.get("policy") == "static" else SIGNALS[features],
        "policy_options": {"hidden_dim": hidden_dim} if row.get("policy") in WITH_HIDDEN_DIM else {},
        "units": ["head"],
    }


def _site(site: Any) -> Any:
    if not isinstance(site, Mapping):
        return site
    rest = dict(site)
    geometry = {name: rest.pop(name) for name in ("heads", "kv_heads", "head_dim") if name in rest}
    return {"unit": "head", **rest, "geometry": geometry}


def renamed(tensors: Mapping[str, Tensor], policy: str) -> dict[str, Tensor]:
    """Weights of format 1 under today's names: statistics stand beside the agents that they belong to."""
    new = {}
    for name, tensor in tensors.items():
        kind, _, index = name.partition("_")
        if kind in ("mean", "std") and index.isdigit():
            name = f"statistics.{index}.{kind}"
        elif policy == "predictor" and name in ("mean", "std"):
            name = f"statistics.{name}"
        new[name] = tensor
    return new
