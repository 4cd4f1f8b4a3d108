"""Phi-3 throws its cache away and reads everything anew where a text crosses a length; a pruned answer cannot."""

import sys
from contextlib import ExitStack
from typing import Any

from microglia.anatomy.attention import View
from microglia.anatomy.swap import swap
from microglia.errors import ConfigError


def never_reread(stack: ExitStack, lm: Any, prompt: int, new_tokens: int) -> None:
    """Until the stack closes, the model's own `generate` continues the cache of a prompt of so many tokens.

    Raises ConfigError where that would mix two rotary embeddings (longrope) in one text.
    """
    limit = getattr(lm.config, "original_max_position_embeddings", None)
    if limit is None or not prompt <= limit < prompt + new_tokens - 1:
        return
    if "longrope" in {kind for module in lm.modules() for kind in rope_types(module).values()}:
        raise ConfigError(
            f"{prompt} tokens of prompt and {new_tokens} new ones cross the length of {limit} at which this model "
            "changes its rotary embedding and reads everything anew, and a second decision would be made with the "
            "answer in view; ask for fewer tokens or use execution='dense'"
        )
    swap(stack, lm, "config", View(lm.config, original_max_position_embeddings=sys.maxsize))


def rope_types(module: Any) -> dict[str | None, str]:
    """The kinds of rotary embedding that a module makes, by kind of layer (None where all layers share one)."""
    kinds = getattr(module, "rope_type", None)
    return {None: kinds} if isinstance(kinds, str) else dict(kinds or {})
