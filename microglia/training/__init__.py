"""Train agents (and, on request, LoRA) so that pruned answers stay right.

TrainingConfig is here at once; what needs torch is imported when it is first used, so that `--help` answers at once.
"""

from typing import TYPE_CHECKING, Any

from microglia.training.config import TrainingConfig

if TYPE_CHECKING:
    from microglia.training.loop import RunFolder, TrainingResult, train

__all__ = ["RunFolder", "TrainingConfig", "TrainingResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    from microglia.training import loop

    return getattr(loop, name)
