"""Checkpoints that come with the package, by the name of the model that they were trained for."""

from importlib import resources
from pathlib import Path

from microglia.errors import ConfigError
from microglia.registry import listed

PLACE = Path(str(resources.files("microglia"))) / "agents"


def shipped_names() -> list[str]:
    """The models for which agents come with the package."""
    return sorted(folder.name for folder in PLACE.iterdir() if folder.is_dir()) if PLACE.is_dir() else []


def shipped(model: str) -> Path:
    """The folder of the agents that come with the package for this model.

    Raises ConfigError, naming the models that have some, for any other.
    """
    if model not in shipped_names():
        raise ConfigError(
            f"no checkpoint was given, and no agents come with microglia for model={model!r}; say --model-path FOLDER, "
            f"which `microglia train` writes, or choose {listed(shipped_names())}"
        )
    return PLACE / model
