"""The folder in which microglia keeps what is fetched or made once and used again."""

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`MICROGLIA_CACHE`, else `microglia` in the user's cache folder, and below it the folder of one kind of thing."""
    given = os.environ.get("MICROGLIA_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "microglia"
    return Path(given or home).expanduser().joinpath(*parts)
