"""A trained policy on disk: `microglia_config.json`, `agents.safetensors`, the LoRA adapter and a model card."""

from microglia.checkpoint.checkpoint import Checkpoint
from microglia.checkpoint.config import FORMAT_VERSION, MicrogliaConfig, SavedSite
from microglia.checkpoint.files import CONFIG, check_writable, write_atomically

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "Checkpoint",
    "MicrogliaConfig",
    "SavedSite",
    "check_writable",
    "write_atomically",
]
