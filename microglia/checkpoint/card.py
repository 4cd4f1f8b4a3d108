"""The model card of a checkpoint, written from its configuration."""

import json
from collections.abc import Mapping
from typing import Any

from microglia.checkpoint.config import MicrogliaConfig
from microglia.policies import POLICIES


def model_card(config: MicrogliaConfig, *, policy_parameters: int) -> str:
    """Markdown with the hub's metadata: what it belongs to, how it was trained, how it is used."""
    share = f" ({policy_parameters / config.base_parameters:.2%} of the base model)" if config.base_parameters else ""
    units = sum(geometry.count for geometry in config.geometries)
    what = "head" if config.units == ("head",) else "unit"
    kind = POLICIES[config.policy].describes
    rows = {
        "base model": f"`{config.base_model}` ({config.model_class})",
        "prunes": f"{units} units ({', '.join(config.units)}) in {len(config.sites)} sites",
        "policy": f"{kind}, {policy_parameters:,} parameters{share}",
        "signals": f"{', '.join(config.signals) or 'none'}; entropy window {config.window or 'all'}",
        "gate": f"threshold {config.threshold:.4g}, bucket {config.bucket or f'{what}s / 8'}, fill `{config.fill}`",
        "LoRA": "yes, in `adapter/`" if config.lora else "no",
    }
    if config.promise:
        rows["promise"] = config.promise.get("sentence", "")
    return "\n".join(
        [
            "---",
            "library_name: microglia",
            *([f"base_model: {config.base_model}"] if config.base_model.count("/") == 1 else []),
            f"tags: [{'attention-head-pruning' if config.units == ('head',) else 'structured-pruning'}, microglia]",
            "---",
            "",
            f"# {'Attention-head' if config.units == ('head',) else 'Input-adaptive'} pruning for {config.base_model}",
            "",
            f"The prompt is read with every {what}; the answer is written with those that this policy keeps for it.",
            "",
            *_table(rows),
            "",
            "## Use",
            "",
            "```python",
            "from microglia import MicrogliaPruningSystem",
            "",
            'system = MicrogliaPruningSystem.from_pretrained("this folder or its hub id")',
            'print(system.generate("What is 15% of 240?"), system.get_sparsity())',
            "```",
            "",
            "## Training",
            "",
            *(_table(_flat(config.training)) if config.training else [f"Not trained yet: every {what} is kept."]),
            "",
        ]
    )


def _table(rows: Mapping[str, Any]) -> list[str]:
    cells = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return ["| | |", "|---|---|", *cells]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names; lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat
